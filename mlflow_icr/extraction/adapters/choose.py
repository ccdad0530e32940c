"""Choose the adapter by the classes of a pipeline's network and scheduler."""

from __future__ import annotations

from typing import Any

from torch import nn

from mlflow_icr.extraction.adapters.classes import ClassCondition, null_class_of
from mlflow_icr.extraction.adapters.flux import null_flux
from mlflow_icr.extraction.adapters.sd3 import null_sd3
from mlflow_icr.extraction.adapters.text import null_text
from mlflow_icr.extraction.denoisers import Call, Denoiser, EDMDenoiser, SchedulerDenoiser
from mlflow_icr.extraction.flow import FlowDenoiser
from mlflow_icr.extraction.latents import Autoencoder, LatentDenoiser

NETWORKS = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)


def adapt(
    network: nn.Module,
    scheduler: Any,
    *,
    null_class: int | None = None,
    call: Call | None = None,
    autoencoder: nn.Module | Autoencoder | None = None,
) -> Denoiser:
    """A network of diffusers as a denoiser, by the prediction type in its scheduler's config.

    It takes epsilon, sample or v_prediction of a variance-preserving scheduler (one with `alphas_cumprod`), flow matching, and
    EDM's preconditioning. `null_class` is that of a class-conditional network; `call` runs a network with another condition;
    with an `autoencoder` the network's images are latents. Raises ValueError for a scheduler of another kind.
    """
    config, name = scheduler.config, type(scheduler).__name__
    prediction = config.get("prediction_type", "epsilon")
    denoiser: Denoiser
    if name.startswith("FlowMatch") or prediction == "flow_prediction":
        denoiser = FlowDenoiser(network, time_scale=float(config["num_train_timesteps"]), null_class=null_class, call=call)
    elif name.startswith("EDM"):
        if prediction != "epsilon":
            raise ValueError(f"the scheduler {name} has prediction_type {prediction!r}; expected epsilon")
        denoiser = EDMDenoiser(network, float(config["sigma_data"]), null_class=null_class, call=call)
    elif config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"the scheduler {name} has timestep_type {config['timestep_type']!r}; expected discrete")
    elif not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"the scheduler is a {name}; expected DDPMScheduler or one of its kind, of flow matching, or EDM's")
    else:
        learned = getattr(getattr(network, "config", None), "time_embedding_type", None) == "learned"  # a table of timesteps
        denoiser = SchedulerDenoiser(network, scheduler, nearest=learned, null_class=null_class, call=call)
    if autoencoder is None:
        return denoiser
    return LatentDenoiser(denoiser, autoencoder if isinstance(autoencoder, Autoencoder) else Autoencoder(autoencoder))


def adapt_pipeline(pipeline: Any, *, side: int | None = None, prompt: str = "", class_label: int | None = None) -> Denoiser:
    """A pipeline of diffusers as a denoiser of images of `side` pixels, with the condition that means none.

    `prompt` and `class_label` name another condition. The text encoders are run once, on their device, and not kept. Raises
    ValueError for a network that has no adapter, or a scheduler, side, prompt or label that do not fit.
    """
    network = network_of(pipeline)
    name, autoencoder = type(network).__name__, getattr(pipeline, "vae", None)
    side = side or side_of(pipeline)
    check_side(pipeline, side)
    call: Call | None = None
    if prompt and name in ("UNet2DModel", "DiTTransformer2DModel"):
        raise ValueError(f"prompt is {prompt!r}; expected none, since {name} takes no text")
    if class_label is not None and name != "DiTTransformer2DModel":
        raise ValueError(f"class_label is {class_label}; expected none, since {name} is not conditioned on classes here")
    if name == "UNet2DConditionModel":
        call = null_text(pipeline, side, prompt)
    elif name == "DiTTransformer2DModel":
        call = ClassCondition(label_of(class_label, null_class_of(network)))
    elif name == "SD3Transformer2DModel":
        call = null_sd3(pipeline, prompt)
    elif name == "FluxTransformer2DModel":
        call = null_flux(pipeline, prompt)
    elif getattr(network.config, "num_class_embeds", None) or getattr(network.config, "class_embed_type", None):
        raise ValueError("the network is a UNet2DModel with classes, which does not say which one means none")
    return adapt(network, pipeline.scheduler, call=call, autoencoder=autoencoder)


def label_of(label: int | None, null: int) -> int:
    """The class to read a network with: `label`, or the null class, which is the last. Raises ValueError for another one."""
    if label is not None and not 0 <= label <= null:
        raise ValueError(f"class_label is {label}; expected 0 to {null}, which means none")
    return null if label is None else label


def network_of(pipeline: Any) -> Any:
    """The denoising network of a pipeline. Raises ValueError where it has no adapter."""
    network = getattr(pipeline, "unet", None)
    network = getattr(pipeline, "transformer", None) if network is None else network
    if type(network).__name__ not in NETWORKS:
        raise ValueError(f"the pipeline's network is a {type(network).__name__}; expected one of {', '.join(NETWORKS)}")
    return network


def _pixels_a_side(pipeline: Any) -> int:
    """Pixels along a side for one value of the network's input: 1, or the autoencoder's downsampling."""
    autoencoder = getattr(pipeline, "vae", None)
    return 1 if autoencoder is None else int(2 ** (len(autoencoder.config.block_out_channels) - 1))


def side_of(pipeline: Any) -> int:
    """The side in pixels of the images that a pipeline's network was made for. Raises ValueError where it does not say one."""
    network = network_of(pipeline)
    size = network.config.get("sample_size") or getattr(pipeline, "default_sample_size", None)
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        raise ValueError(f"the network's sample_size is {size!r}; expected a whole number, or a resolution to be given")
    return size * _pixels_a_side(pipeline)


def check_side(pipeline: Any, side: int) -> None:
    """Raise ValueError for images whose side the network cannot take: latents fill whole patches."""
    network = network_of(pipeline)
    # Flux's patches are made outside of the network; its config has patch size 1.
    patch = 2 if type(network).__name__ == "FluxTransformer2DModel" else int(network.config.get("patch_size") or 1)
    unit = _pixels_a_side(pipeline) * patch
    if side < unit or side % unit:
        raise ValueError(f"resolution is {side}; expected a multiple of {unit} pixels, which this pipeline takes")
    autoencoder = getattr(pipeline, "vae", None)
    channels = network.config["in_channels"] // (4 if type(network).__name__ == "FluxTransformer2DModel" else 1)
    if autoencoder is not None and autoencoder.config.latent_channels != channels:
        raise ValueError(
            f"the network takes {channels} channels, and the autoencoder makes {autoencoder.config.latent_channels}; expected "
            "a network of latents only, without a mask or an image as a condition"
        )


def image_channels(denoiser: Denoiser) -> int | None:
    """The channels of a denoiser's images, mostly 1 or 3; None where they are unknown."""
    if isinstance(denoiser, LatentDenoiser):
        return denoiser.autoencoder.channels
    config = getattr(denoiser.network, "config", None)
    return None if config is None else config.get("in_channels")
