"""What the features say: view moments and the invariant spectrum (pure tensor maths)."""

from mlflow_icr.representation.moments import ViewMoments, icr
from mlflow_icr.representation.spectrum import InvariantSpectrum

__all__ = ["InvariantSpectrum", "ViewMoments", "icr"]
