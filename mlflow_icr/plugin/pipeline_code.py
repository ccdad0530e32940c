"""The program that MLflow runs to load a logged pipeline: a model from code, so that nothing is pickled."""

from mlflow.models import set_model

from mlflow_icr.plugin.pipeline import PipelineModel

set_model(PipelineModel())
