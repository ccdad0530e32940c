"""Measures of features: view moments, the invariant spectrum, its interval, and companions (pure tensor maths)."""

from mlflow_icr.representation.companions import (
    alignment,
    class_separation,
    effective_rank,
    feature_deviation,
    lidar,
    rankme,
    stable_rank,
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
from mlflow_icr.representation.moments import ViewMoments, as_double, icr, principal_directions
from mlflow_icr.representation.probes import knn_accuracy, linear_probe_accuracy, silhouette
from mlflow_icr.representation.spectrum import InvariantSpectrum
from mlflow_icr.representation.view_error import Estimate, heldout_error_ratio, view_auc, view_error_ratio, view_excess

__all__ = [
    "Estimate",
    "ICRInterval",
    "InvariantSpectrum",
    "ViewMoments",
    "alignment",
    "as_double",
    "class_separation",
    "effective_rank",
    "feature_deviation",
    "heldout_error_ratio",
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
    "stable_rank",
    "uniformity",
    "variability_ratio",
    "view_auc",
    "view_error_ratio",
    "view_excess",
]
