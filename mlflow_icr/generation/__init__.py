"""What the samples say: distances between sets of embeddings, and copies (pure tensor maths)."""

from mlflow_icr.generation.frechet import frechet_distance
from mlflow_icr.generation.memorization import MemorizationRatio, memorization_ratio

__all__ = ["MemorizationRatio", "frechet_distance", "memorization_ratio"]
