"""The program that MLflow runs to load a checkpoint: a model from code, so that nothing is pickled."""

from mlflow.models import set_model

from mlflow_icr.tracking.checkpoints.sampling_model import SamplingModel

set_model(SamplingModel())
