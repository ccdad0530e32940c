"""The start of a training from a trained network: a run's, a diffusers folder, or a name on the hub.

The network's shape, prediction and noise then stay its own: they fill in the configuration, and flags that say otherwise are
refused.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlflow_icr.extraction.images import height_width, parse_size
from mlflow_icr.extraction.pipelines import INDEX, NULL_CLASS, SCHEDULER, load_network, load_scheduler, pipeline_folder

PARTS = {"UNet2DModel": "unet", "DiTTransformer2DModel": "transformer"}
# Settings of a scheduler that have no option here (`trainers/families/ddpm.py`); other values are refused.
USUAL = {"trained_betas": None, "rescale_betas_zero_snr": False, "timestep_type": "discrete"}
EMBEDDING_STD = 0.02  # as in DiT
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
FREE = ("autoencoder", "dropout")  # options that may differ from those of the training that made the network


@dataclass(frozen=True)
class Start:
    """The folder of a trained network, its config, and the options that a configuration needs to continue it, by flat name."""

    place: str
    folder: Path  # of the network
    network: Mapping[str, Any]
    implied: Mapping[str, Any]
    attends: tuple[int, ...]  # levels of a U-Net that have attention, from 0
    null_class: int | None  # the class that stands for none, of a network of classes

    @property
    def is_transformer(self) -> bool:
        """Whether it is a DiTTransformer2DModel."""
        return "patch_size" in self.network


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"init_from has a {path.name} that cannot be read ({str(error).splitlines()[0]})") from None
    return content if isinstance(content, dict) else {}


def _root(place: str) -> Path:
    """The folder of the network or its pipeline; of a run, its newest checkpoint."""
    folder = Path(place)
    runs = sorted(path.parent for path in folder.glob(f"checkpoints/[0-9]*/{INDEX}"))
    if runs:
        return runs[-1]
    if (folder / "checkpoints").is_dir():
        raise ValueError(f"init_from is {place!r}, a run without checkpoints; expected one that has saved its network")
    if (folder / "config.json").exists() or any((folder / part / "config.json").exists() for part in PARTS.values()):
        return folder
    try:
        return pipeline_folder(place, trust_remote_code=False)
    except ValueError as error:
        absence = "it holds no model" if folder.is_dir() else "no such folder"
        reason = str(error).split(" (", 1)[1].rsplit(")", 1)[0] if " (" in str(error) else absence
        raise ValueError(
            f"init_from is {place!r}; expected a run, a diffusers folder of a UNet2DModel or a DiTTransformer2DModel, or a "
            f"name on the hub ({reason})"
        ) from None


@lru_cache(maxsize=8)
def find_start(place: str) -> Start:
    """The trained network at a place. Raises ValueError if there is none that can be used."""
    root = _root(place)
    folder = next((root / part for part in PARTS.values() if (root / part / "config.json").exists()), root)
    config = _json(folder / "config.json")
    kind = str(config.get("_class_name"))
    if kind not in PARTS:
        raise ValueError(f"init_from is {place!r}, with the network {kind}; expected one of {', '.join(PARTS)}")
    if (root / "vqvae").exists():
        raise ValueError(f"init_from is {place!r}, a model of codes; expected one of pixels, or of an AutoencoderKL's latents")
    takes, gives = config.get("in_channels"), config.get("out_channels") or config.get("in_channels")
    if not isinstance(takes, int) or gives not in (takes, 2 * takes):
        raise ValueError(f"init_from is {place!r}, whose network makes {gives} channels of {takes}; expected as many, or twice")
    implied = _network_options(kind, config) | _noise_options(place, root)
    if gives != takes:  # the others are a learned variance's, as DiT has it
        implied.setdefault("family", "ddpm")
    if (root / "vae" / "config.json").exists():
        implied["autoencoder"] = str(root / "vae")
    null: int | None
    if kind == "DiTTransformer2DModel":
        null = int(config.get("num_embeds_ada_norm") or 0)
    else:
        null = _json(root / INDEX).get(NULL_CLASS) if config.get("num_class_embeds") else None
    attends = tuple(i for i, block in enumerate(config.get("down_block_types", ())) if "Attn" in block)
    return Start(place, folder, config, implied, attends, null)


def _network_options(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The network options that describe this network, as far as there are options for it."""
    options: dict[str, Any] = {"dropout": float(config.get("dropout") or 0)}
    if kind == "DiTTransformer2DModel":
        heads = int(config["num_attention_heads"])
        options |= {"hidden_size": heads * int(config["attention_head_dim"]), "num_heads": heads}
        return options | {"num_layers": int(config["num_layers"]), "patch_size": int(config["patch_size"])}
    block_channels = tuple(config["block_out_channels"])
    return options | {"block_channels": block_channels, "layers_per_block": int(config["layers_per_block"])}


def _noise_options(place: str, root: Path) -> dict[str, Any]:
    """The options of family and noise that a folder's scheduler stands for; none without a scheduler."""
    if not (root / SCHEDULER).exists():
        return {}
    with torch.random.fork_rng(devices=[]):  # diffusers draws from the global generator where it makes some schedulers
        scheduler = load_scheduler(root)
    config, name = scheduler.config, type(scheduler).__name__
    predicted, kinds = config.get("prediction_type", "epsilon"), list(PREDICTIONS)
    if name.startswith("FlowMatch"):
        return {"family": "flow"}
    if not name.startswith("EDM") and not hasattr(scheduler, "alphas_cumprod"):
        kind = "DDPMScheduler or one of its kind, of flow matching, or EDM's"
        raise ValueError(f"init_from is {place!r}, whose scheduler is a {name}; expected {kind}")
    if name.startswith("EDM"):
        kinds = kinds[:1]
    if predicted not in kinds:
        raise ValueError(f"init_from is {place!r}, which predicts {predicted!r}; expected {' or '.join(kinds)}")
    if name.startswith("EDM"):
        return {"family": "edm", "sigma_data": float(config["sigma_data"])}
    for key, usual in USUAL.items():
        if config.get(key, usual) != usual:
            raise ValueError(f"init_from is {place!r}, whose scheduler has {key} {config[key]!r}; expected {usual!r}")
    options = {"family": "ddpm", "prediction": PREDICTIONS[predicted], "timesteps": config["num_train_timesteps"]}
    return options | {key: config[key] for key in ("beta_schedule", "beta_start", "beta_end")}


def started_values(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a configuration, by flat name, replaced by those that its `init_from` implies; FREE `changes` stay.

    Raises ValueError where other changes say otherwise.
    """
    start = find_start(str(values["init_from"]))
    implied = dict(start.implied)
    kinds = ("flow", "ddpm") if start.is_transformer else ("edm", "ddpm")
    family = implied.setdefault("family", changes.get("family", values.get("family", kinds[0])))
    if family not in kinds:
        what = "transformer" if start.is_transformer else "U-Net"
        raise ValueError(f"init_from is {start.place!r}, a {what} of family {family}; expected one of {' or '.join(kinds)}")
    if family == "ddpm":
        implied["transformer"] = start.is_transformer
    implied = {key: value for key, value in implied.items() if key not in FREE or key not in changes}
    factor = _downsampling(implied.get("autoencoder", values.get("autoencoder", "")))
    made_for = start.network.get("sample_size")
    # A U-Net takes images of any size, a transformer those that it was made for.
    if made_for is not None and "resolution" not in (changes if start.is_transformer else values):
        height, width = (side * factor for side in height_width(made_for))
        implied["resolution"] = height if height == width else f"{height}x{width}"
    resolution = implied.get("resolution", values.get("resolution"))
    if resolution is None:
        raise ValueError(f"init_from is {start.place!r}, whose config has no sample_size; expected --resolution")
    if not start.is_transformer:
        side = min(height_width(parse_size(resolution))) // factor
        implied["attention_resolutions"] = tuple(side // 2**level for level in start.attends)
    for key, value in implied.items():
        wanted = tuple(changes[key]) if isinstance(changes.get(key), list) else changes.get(key)
        if key in changes and wanted != value:
            raise ValueError(f"{key} is {wanted!r}; expected {value!r}, which init_from {start.place!r} has")
    return {**values, **implied}


def _downsampling(autoencoder: str) -> int:
    """Pixels along a side of one latent, by the config of an autoencoder's folder; 1 without one."""
    channels = _json(Path(autoencoder) / "config.json").get("block_out_channels", ()) if autoencoder else ()
    return int(2 ** max(0, len(channels) - 1))


def check_start(start: Start, channels: int, size: tuple[int, int], num_classes: int | None) -> None:
    """Raise ValueError where a network does not fit the training inputs."""
    takes, made_for = start.network.get("in_channels"), start.network.get("sample_size")
    if takes != channels:
        raise ValueError(
            f"init_from is {start.place!r}, whose network takes {takes} channels; expected {channels}, as the data has"
        )
    if start.is_transformer and size != (made_for, made_for):
        raise ValueError(f"init_from is {start.place!r}, a transformer for side {made_for}; expected one for {size[0]}")
    if num_classes is None and start.network.get("num_class_embeds") and start.null_class is None:
        raise ValueError(
            f"init_from is {start.place!r}, a U-Net of classes without one that means none; expected labels, or another network"
        )


def load_start(start: Start, channels: int, num_classes: int | None, dropout: float) -> nn.Module:
    """The network, in float32, with a share of dropout.

    Its table of classes is drawn again if the data has another number of them (None: any). The channels of a learned variance
    are left out: the losses here would not train them, so they would stay those of the earlier training.
    """
    network = load_network(start.folder, dropout=dropout)
    if (network.config.out_channels or channels) != channels:
        _drop_variance(network, channels)
    if num_classes is None:
        return network
    if start.is_transformer:
        if start.null_class != num_classes:
            width = network.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.embedding_dim
            table = nn.Embedding(num_classes + 1, width)
            nn.init.normal_(table.weight, std=EMBEDDING_STD)
            for block in network.transformer_blocks:
                block.norm1.emb.class_embedder.num_classes = num_classes
                block.norm1.emb.class_embedder.embedding_table = copy.deepcopy(table)
            network.register_to_config(num_embeds_ada_norm=num_classes)
    elif start.network.get("num_class_embeds") != num_classes + 1 or start.null_class != num_classes:
        network.class_embedding = nn.Embedding(num_classes + 1, network.time_embedding.linear_2.out_features)
        network.register_to_config(num_class_embeds=num_classes + 1)
    return network


def _drop_variance(network: Any, channels: int) -> None:
    """Leave out all but the first output channels of a network: they are the prediction, the others a variance."""
    last = network.proj_out_2 if hasattr(network, "proj_out_2") else network.conv_out
    with torch.no_grad():
        for tensor in (last.weight, last.bias):  # a patch's pixels, each with its channels, come first in a transformer's
            pixels = tensor.unflatten(0, (-1, network.config.out_channels))
            tensor.data = pixels[:, :channels].flatten(0, 1).clone()
    if isinstance(last, nn.Linear):
        last.out_features = len(last.weight)
        network.out_channels = channels
    else:
        last.out_channels = channels
    network.register_to_config(out_channels=channels)
