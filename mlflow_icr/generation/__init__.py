"""Measures of generated samples: distances between sets of embeddings, diversity, and copies. Tensor maths only."""

from mlflow_icr.generation.diversity import inception_score, vendi_score
from mlflow_icr.generation.duplicates import NearDuplicates, near_duplicates
from mlflow_icr.generation.empirical import distances_from_optimal, optimal_denoiser
from mlflow_icr.generation.frechet import (
    GaussianStatistics,
    frechet_distance,
    frechet_distance_infinity,
    gaussian_statistics,
)
from mlflow_icr.generation.generalization import ct_score, fld, fld_gap, mifid
from mlflow_icr.generation.index import index_nearest
from mlflow_icr.generation.kernel import kernel_distance
from mlflow_icr.generation.manifold import density_coverage, precision_recall
from mlflow_icr.generation.memorization import (
    Authenticity,
    CarliniRatio,
    CopySimilarity,
    Detection,
    MemorizationRatio,
    authenticity,
    carlini_ratio,
    copy_similarity,
    memorization_ratio,
)
from mlflow_icr.generation.neighbours import Neighbours, Search, k_nearest
from mlflow_icr.generation.reference import Reference

__all__ = [
    "Authenticity",
    "CarliniRatio",
    "CopySimilarity",
    "Detection",
    "GaussianStatistics",
    "MemorizationRatio",
    "NearDuplicates",
    "Neighbours",
    "Reference",
    "Search",
    "authenticity",
    "carlini_ratio",
    "copy_similarity",
    "ct_score",
    "density_coverage",
    "distances_from_optimal",
    "fld",
    "fld_gap",
    "frechet_distance",
    "frechet_distance_infinity",
    "gaussian_statistics",
    "inception_score",
    "index_nearest",
    "k_nearest",
    "kernel_distance",
    "memorization_ratio",
    "mifid",
    "near_duplicates",
    "optimal_denoiser",
    "precision_recall",
    "vendi_score",
]
