"""What the features say: view moments, the invariant spectrum, its interval, and companions (pure tensor maths)."""

from mlflow_icr.representation.companions import (
    alignment,
    class_separation,
    effective_rank,
    lidar,
    rankme,
    uniformity,
    variability_ratio,
)
from mlflow_icr.representation.interval import (
    ICRInterval,
    icr_interval,
    interval_from_terms,
    leave_one_out_terms,
    paired_difference,
)
from mlflow_icr.representation.moments import ViewMoments, icr, principal_directions
from mlflow_icr.representation.probes import knn_accuracy, linear_probe_accuracy, silhouette
from mlflow_icr.representation.spectrum import InvariantSpectrum
from mlflow_icr.representation.view_error import ViewErrorRatio, view_error_ratio

__all__ = [
    "ICRInterval",
    "InvariantSpectrum",
    "ViewErrorRatio",
    "ViewMoments",
    "alignment",
    "class_separation",
    "effective_rank",
    "icr",
    "icr_interval",
    "interval_from_terms",
    "knn_accuracy",
    "leave_one_out_terms",
    "lidar",
    "linear_probe_accuracy",
    "paired_difference",
    "principal_directions",
    "rankme",
    "silhouette",
    "uniformity",
    "variability_ratio",
    "view_error_ratio",
]
