"""Is a diffusion model still learning, or has it begun to copy its training images?

The Invariant Contamination Ratio (ICR) of a denoiser's features, its energies, and generative and memorization metrics.
"""

from mlflow_icr.extraction import Denoiser, EDMDenoiser, heun_sample, make_views
from mlflow_icr.generation import MemorizationRatio, frechet_distance, memorization_ratio
from mlflow_icr.monitoring import (
    GenerationMonitor,
    ICRMonitor,
    LossMonitor,
    Protocol,
    Report,
    Verdict,
    compare,
    geometric_schedule,
    summarise,
    verdict,
)
from mlflow_icr.representation import (
    ICRInterval,
    InvariantSpectrum,
    ViewErrorRatio,
    ViewMoments,
    alignment,
    class_separation,
    effective_rank,
    icr,
    icr_interval,
    knn_accuracy,
    lidar,
    linear_probe_accuracy,
    rankme,
    silhouette,
    uniformity,
    variability_ratio,
    view_error_ratio,
)
from mlflow_icr.version import __version__

__all__ = [
    "Denoiser",
    "EDMDenoiser",
    "GenerationMonitor",
    "ICRInterval",
    "ICRMonitor",
    "InvariantSpectrum",
    "LossMonitor",
    "MemorizationRatio",
    "Protocol",
    "Report",
    "Verdict",
    "ViewErrorRatio",
    "ViewMoments",
    "__version__",
    "alignment",
    "class_separation",
    "compare",
    "effective_rank",
    "frechet_distance",
    "geometric_schedule",
    "heun_sample",
    "icr",
    "icr_interval",
    "knn_accuracy",
    "lidar",
    "linear_probe_accuracy",
    "make_views",
    "memorization_ratio",
    "rankme",
    "silhouette",
    "summarise",
    "uniformity",
    "variability_ratio",
    "verdict",
    "view_error_ratio",
]
