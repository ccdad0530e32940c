"""From images to features: views, denoisers, taps and samplers."""

from mlflow_icr.extraction.denoisers import Denoiser, EDMDenoiser, SchedulerDenoiser
from mlflow_icr.extraction.keyed import keyed_generator
from mlflow_icr.extraction.samplers import heun_sample
from mlflow_icr.extraction.taps import Tap, middle_layers, pool, resolve_layer
from mlflow_icr.extraction.views import AUGMENTATION_LEVELS, as_unit_interval, make_views

__all__ = [
    "AUGMENTATION_LEVELS",
    "Denoiser",
    "EDMDenoiser",
    "SchedulerDenoiser",
    "Tap",
    "as_unit_interval",
    "heun_sample",
    "keyed_generator",
    "make_views",
    "middle_layers",
    "pool",
    "resolve_layer",
]
