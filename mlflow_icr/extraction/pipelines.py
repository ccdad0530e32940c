"""Load a saved pipeline, a diffusers folder or a name on the hub, as a denoiser."""

from __future__ import annotations

import json
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mlflow_icr.extraction.adapters import ClassCondition, adapt, adapt_pipeline
from mlflow_icr.extraction.adapters.choose import NETWORKS, label_of, side_of
from mlflow_icr.extraction.denoisers import Denoiser
from mlflow_icr.extraction.images import Size
from mlflow_icr.extraction.latents import LatentDenoiser, load_autoencoder

NULL_CLASS = "_null_class"  # in model_index.json: which class of a U-Net stands for none
INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
# The parts that a measurement needs; safety checkers and image encoders are not loaded.
PARTS = re.compile(r"unet|transformer|vae|scheduler|(text_encoder|tokenizer)(_\d)?")
TEXT = re.compile("text_encoder|tokenizer")  # often larger than the network, and not needed after the condition is computed
LIBRARIES = ("diffusers", "transformers")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_denoiser(place: Path | str, **options: Any) -> tuple[Denoiser, Size]:
    """The denoiser of a saved pipeline, and its images' side in pixels, or (height, width); options are `load_pipeline`'s.

    A folder with `unet/` (a UNet2DModel) and `scheduler/` will do. Raises ValueError as `load_pipeline` does.
    """
    denoiser, side, _ = load_pipeline(place, **options)
    return denoiser, side


def load_pipeline(
    place: Path | str,
    *,
    resolution: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    prompt: str = "",
    class_label: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[Denoiser, Size, Any]:
    """The denoiser of a diffusers folder or a name on the hub, its images' side in pixels, and the pipeline where one was made.

    A Path is a folder only; diffusers looks for a text with one slash that names no folder here on the hub. Weights are
    safetensors: nothing is unpickled, and no code in a pipeline is run unless `trust_remote_code`. Networks of text or classes
    get the condition that means none, or `prompt` or `class_label`. `dtype` is the network's; an
    autoencoder stays in float32, since some do not work in less. `resolution` None is the network's own, `device` None the CPU.
    Raises ValueError, in one line, for a place, network, scheduler, weights or options that do not fit.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    target = _device(device)
    folder = pipeline_folder(place, trust_remote_code)
    with torch.random.fork_rng(devices=[]):  # diffusers draws from the global generator where it makes a scheduler
        part = _bare_part(folder)
        if part is not None:
            if prompt:
                raise ValueError("prompt is for networks of text; expected none")
            denoiser, side = _from_parts(folder, part, class_label)
            side, pipeline = resolution or side, None
        else:
            pipeline = _full_pipeline(folder, DTYPES[dtype], trust_remote_code)
            side = square = resolution or side_of(pipeline)
            denoiser = adapt_pipeline(pipeline, side=square, prompt=prompt, class_label=class_label)
            pipeline.register_modules(**dict.fromkeys((name for name in pipeline.components if TEXT.match(name)), None))
    if resolution is not None:
        _check_resolution(denoiser, resolution)
    network = denoiser.network.to(target).eval().requires_grad_(False)
    if pipeline is None and DTYPES[dtype] != torch.float32:
        network.to(DTYPES[dtype])
    if isinstance(denoiser, LatentDenoiser):
        denoiser.autoencoder.network.to(target).eval().requires_grad_(False)
    return denoiser, side, pipeline


def _check_resolution(denoiser: Denoiser, resolution: int) -> None:
    """Raise ValueError for a side that a UNet2DModel cannot halve at each of its levels; other networks take what they get."""
    config = getattr(denoiser.network, "config", {})
    if config.get("_class_name", type(denoiser.network).__name__) != "UNet2DModel":
        return
    unit = 2 ** (len(config["down_block_types"]) - 1)
    unit *= denoiser.autoencoder.factor if isinstance(denoiser, LatentDenoiser) else 1
    if resolution % unit:
        raise ValueError(f"resolution is {resolution}; expected a multiple of {unit}, as the network's levels need")


def batch_size_for(denoiser: Denoiser) -> int:
    """The default number of views in a forward pass: small for latents of large images."""
    return 16 if isinstance(denoiser, LatentDenoiser) else 512


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device("cpu" if name is None else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which is not here ({str(error).splitlines()[0]})") from None
    return device


def pipeline_folder(place: Path | str, trust_remote_code: bool) -> Path:
    """The folder itself, or the folder that diffusers' loader has downloaded for a name on the hub."""
    folder = Path(place)
    if any((folder / part).exists() for part in (INDEX, "unet/config.json")):
        return folder
    name = str(place)
    if isinstance(place, Path) or folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"checkpoint is {name!r}; expected a diffusers folder with unet/ and scheduler/, or with {INDEX}")
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name, use_safetensors=True, trust_remote_code=trust_remote_code))
    except Exception as error:  # the hub's client and its transports raise many kinds of exceptions
        raise ValueError(
            f"checkpoint is {name!r}, which is no folder here, and cannot be downloaded from the hub ({_line(error)}); "
            f"expected a diffusers folder with unet/ and scheduler/, or with {INDEX}"
        ) from None


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {textwrap.shorten(lines[0], 160, placeholder=' ...')}"


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint has no {path.name} that can be read ({_line(error)})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a config; expected an object with _class_name")
    return config


def _bare_part(folder: Path) -> str | None:
    """The subfolder of a network that can be read without a pipeline, a UNet2DModel of pixels or one of ours; else None.

    Our own folders of flow matching and of latents come with a pipeline's code, which is not run.
    """
    bare_kinds = {"unet": "UNet2DModel", "transformer": "DiTTransformer2DModel"}
    if (folder / "vqvae").exists():  # its network works on codes, and would be read as one of pixels
        raise ValueError("checkpoint has a vqvae; expected a network of pixels, or one of the latents of an AutoencoderKL")
    path = folder / INDEX
    ours = path.exists() and isinstance(_config(path).get("_class_name"), list)
    for part, kind in bare_kinds.items():
        config_path = folder / part / "config.json"
        if config_path.exists() and _config(config_path).get("_class_name") == kind:
            return part if ours or (part == "unet" and not (folder / "vae").exists()) else None
    return None


def load_network(folder: Path, **changes: Any) -> Any:
    """A network of diffusers from its own folder, in float32, with `changes` of its config.

    Raises ValueError for another class or other weights.
    """
    import diffusers

    name = str(_config(folder / "config.json").get("_class_name"))
    if name not in NETWORKS:
        raise ValueError(f"checkpoint has the network {name}; expected one of {', '.join(NETWORKS)}")
    try:
        return getattr(diffusers, name).from_pretrained(folder, use_safetensors=True, **changes)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"checkpoint has no weights as safetensors in {str(folder)!r} ({_line(error)})") from None


def load_scheduler(folder: Path) -> Any:
    """The scheduler of a diffusers folder. Raises ValueError where there is none, or none of diffusers'."""
    import diffusers

    config = _config(folder / SCHEDULER)
    scheduler_class = getattr(diffusers, str(config.get("_class_name")), None)
    if scheduler_class is None or not hasattr(scheduler_class, "from_config"):
        raise ValueError(f"checkpoint has the scheduler {config.get('_class_name')!r}; expected one of diffusers'")
    return scheduler_class.from_config(config)


def _from_parts(folder: Path, part: str, class_label: int | None) -> tuple[Denoiser, Size]:
    scheduler, network = load_scheduler(folder), load_network(folder / part)
    null, call = _null_class(folder, network), None
    if class_label is not None:
        if null is None:
            raise ValueError("class_label is for networks of classes; expected none")
        call = ClassCondition(label_of(class_label, null))
    size, autoencoder, factor = network.config["sample_size"], None, 1
    if (folder / "vae").exists():
        autoencoder = load_autoencoder(folder / "vae")
        factor = autoencoder.factor
    side: Size = size * factor if isinstance(size, int) else (size[0] * factor, size[1] * factor)
    return adapt(network, scheduler, null_class=null, call=call, autoencoder=autoencoder), side


def _null_class(folder: Path, network: Any) -> int | None:
    """The null class of a network of classes; None for one without. Raises ValueError for a U-Net that names none."""
    config = network.config
    if "num_embeds_ada_norm" in config:  # a DiT's table always ends with it
        return int(config["num_embeds_ada_norm"])
    if not config.get("num_class_embeds") and not config.get("class_embed_type"):
        return None
    label = _config(folder / INDEX).get(NULL_CLASS) if (folder / INDEX).exists() else None
    if not isinstance(label, int):
        raise ValueError(
            "the network is a UNet2DModel with classes, which does not say which one means none; "
            f"expected {NULL_CLASS} in its {INDEX}"
        )
    return label


def _full_pipeline(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The pipeline of a folder, without the parts that a measurement does not need."""
    from diffusers import DiffusionPipeline

    index = _config(folder / INDEX)
    parts = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    # diffusers must also be given the parts that were saved as none, such as Stable Diffusion 3's third text encoder.
    left_out = {name: None for name, (library, _) in parts.items() if library is None or not PARTS.fullmatch(name)}
    for name, (library, kind) in parts.items():
        if name in left_out:
            continue
        if library not in LIBRARIES and not trust_remote_code:
            raise ValueError(f"checkpoint's {name} is a {kind} of {library!r}; expected one of diffusers' or transformers'")
        if name in ("unet", "transformer") and kind not in NETWORKS:
            raise ValueError(f"checkpoint has the network {kind}; expected one of {', '.join(NETWORKS)}")
    options: dict[str, Any] = {}
    if dtype != torch.float32:  # newer versions have another name for it, and accept this one
        options["torch_dtype"] = {"vae": torch.float32, "default": dtype}
    if "requires_safety_checker" in index:  # nothing is generated
        options["requires_safety_checker"] = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return DiffusionPipeline.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                **left_out,
                **options,
            )
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, SafetensorError) as error:
        raise ValueError(f"checkpoint is {str(folder)!r}, which diffusers does not load ({_line(error)})") from None
