"""Is a diffusion model still learning, or has it begun to copy its training images?

The Invariant Contamination Ratio (ICR) of a denoiser's features, its energies, and generative and memorization metrics.
"""

from mlflow_icr.extraction import Denoiser, EDMDenoiser, heun_sample, make_views
from mlflow_icr.generation import MemorizationRatio, frechet_distance, memorization_ratio
from mlflow_icr.monitoring import GenerationMonitor, ICRMonitor, Protocol, Report, geometric_schedule, summarise
from mlflow_icr.representation import InvariantSpectrum, ViewMoments, icr
from mlflow_icr.version import __version__

__all__ = [
    "Denoiser",
    "EDMDenoiser",
    "GenerationMonitor",
    "ICRMonitor",
    "InvariantSpectrum",
    "MemorizationRatio",
    "Protocol",
    "Report",
    "ViewMoments",
    "__version__",
    "frechet_distance",
    "geometric_schedule",
    "heun_sample",
    "icr",
    "make_views",
    "memorization_ratio",
    "summarise",
]
