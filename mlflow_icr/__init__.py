"""Is a diffusion model still learning, or has it begun to copy its training images?

The Invariant Contamination Ratio (ICR) of a denoiser's features, its energies, and generative and memorization metrics.

Names are imported from the packages below when they are first used, because `import mlflow` always imports
`mlflow_icr.plugin`, and must not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mlflow_icr.version import __version__

if TYPE_CHECKING:
    from mlflow_icr.extraction import Denoiser, EDMDenoiser, SchedulerDenoiser, heun_sample, make_views
    from mlflow_icr.generation import (
        Authenticity,
        CarliniRatio,
        CopySimilarity,
        MemorizationRatio,
        authenticity,
        carlini_ratio,
        copy_similarity,
        ct_score,
        density_coverage,
        fld,
        fld_gap,
        frechet_distance,
        frechet_distance_infinity,
        inception_score,
        kernel_distance,
        memorization_ratio,
        mifid,
        precision_recall,
        vendi_score,
    )
    from mlflow_icr.monitoring import (
        GenerationMonitor,
        ICRMonitor,
        LabelledImages,
        LossMonitor,
        NoiseSweep,
        Protocol,
        Report,
        Verdict,
        VerdictTracker,
        compare,
        geometric_schedule,
        summarise,
        sweep_noise,
        verdict,
    )
    from mlflow_icr.representation import (
        ICRInterval,
        InvariantSpectrum,
        ViewMoments,
        alignment,
        class_separation,
        effective_rank,
        feature_deviation,
        heldout_error_ratio,
        icr,
        icr_interval,
        knn_accuracy,
        lidar,
        linear_probe_accuracy,
        rankme,
        silhouette,
        stable_rank,
        uniformity,
        variability_ratio,
        view_auc,
        view_error_ratio,
        view_excess,
    )
    from mlflow_icr.tracking import best_checkpoint

__all__ = [
    "Authenticity",
    "CarliniRatio",
    "CopySimilarity",
    "Denoiser",
    "EDMDenoiser",
    "GenerationMonitor",
    "ICRInterval",
    "ICRMonitor",
    "InvariantSpectrum",
    "LabelledImages",
    "LossMonitor",
    "MemorizationRatio",
    "NoiseSweep",
    "Protocol",
    "Report",
    "SchedulerDenoiser",
    "Verdict",
    "VerdictTracker",
    "ViewMoments",
    "__version__",
    "alignment",
    "authenticity",
    "best_checkpoint",
    "carlini_ratio",
    "class_separation",
    "compare",
    "copy_similarity",
    "ct_score",
    "density_coverage",
    "effective_rank",
    "feature_deviation",
    "fld",
    "fld_gap",
    "frechet_distance",
    "frechet_distance_infinity",
    "geometric_schedule",
    "heldout_error_ratio",
    "heun_sample",
    "icr",
    "icr_interval",
    "inception_score",
    "kernel_distance",
    "knn_accuracy",
    "lidar",
    "linear_probe_accuracy",
    "make_views",
    "memorization_ratio",
    "mifid",
    "precision_recall",
    "rankme",
    "silhouette",
    "stable_rank",
    "summarise",
    "sweep_noise",
    "uniformity",
    "variability_ratio",
    "vendi_score",
    "verdict",
    "view_auc",
    "view_error_ratio",
    "view_excess",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        for floor in ("representation", "generation", "extraction", "monitoring", "tracking"):
            module = import_module(f"mlflow_icr.{floor}")
            if name in module.__all__:
                globals()[name] = value = getattr(module, name)
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
