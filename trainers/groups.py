"""The groups of a configuration's options.

A new option is one line in its group: it is a flag, a key of `config.yaml` and of presets, a parameter in MLflow, and is
checked, by that line alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlflow_icr.extraction.images import Size, check_background, check_value_range, parse_size
from mlflow_icr.monitoring.schedule import SUSPICION, looks_every
from mlflow_icr.tracking.checkpoints.folder import LOG_MODELS
from trainers.augmentation import AUGMENTATIONS, EDM
from trainers.options import FAMILIES, TRANSFORMER, UNET, Group, network_of, option, refuse, required

STOP_VERDICTS = ("", "turning", "memorizing")  # in the order in which a training passes them
MASKS = ("keyed", "torch")
DECAYS = ("constant", "cosine", "inverse_sqrt")
TIMES = ("uniform", "logit_normal")
PREDICTIONS = ("epsilon", "v", "x0")


@dataclass(frozen=True)
class DataConfig(Group):
    """The images. Training takes the first num_images in an order that the seed fixes."""

    source: str = required("training images: a folder or archive, a preset's set, or the name of a `datasets` set", flag="data")
    resolution: int | str = required("side in pixels, or HEIGHTxWIDTH, to which images are cropped and scaled")
    num_images: int = required("number of training images; a smaller subset is part of a larger one", least=2)
    num_heldout: int = required("number of images that are never trained on, for losses and distances", least=0)
    skip_images: int = option(0, "images to leave out before the training images, for a disjoint subset", least=0)
    split: str = option("train", "split of a `datasets` set", flag="data_split")
    balanced: bool = option(False, "equally many images of each class, as far as there are enough")
    augment: str = option("", "flip: train on mirror images too; edm: EDM's, with labels for the network", one_of=AUGMENTATIONS)
    augment_probability: float = option(0.12, "with edm: probability of each transformation but mirroring", least=0, below=1)
    group_by: str = option("", "keep held-out images apart by folder, file, patient (DICOM), or match of this expression")
    value_range: tuple[float, ...] = option((), "values that are black and white; empty: what the files say, else measured")
    background: str = option("white", "colour behind transparent parts of images")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.size
        check_value_range(self.value_range)
        check_background(self.background)
        if self.augment != EDM and self.augment_probability != DataConfig.augment_probability:  # the default
            refuse("augment_probability", self.augment_probability, f"nothing without augment {EDM}")

    @property
    def size(self) -> Size:
        """The side, or (height, width) of a rectangle."""
        return parse_size(self.resolution)


@dataclass(frozen=True)
class NetworkConfig(Group):
    """The network: its family, its size, and whether it has classes and latents."""

    family: str = option("edm", "kind of diffusion model: EDM, DDPM, or flow matching on a transformer", one_of=FAMILIES)
    transformer: bool = option(False, "with ddpm: train a DiT transformer, not a U-Net", families=("ddpm",))
    labels: bool = option(False, "train on the classes of the data")
    label_dropout: float = option(
        0.1, "share of labels replaced by the null class; the monitor reads that class", above=0, below=1
    )
    autoencoder: str = option("", "folder of a diffusers AutoencoderKL; its latents are trained on")
    block_channels: tuple[int, ...] = option((32, 64), "channels at each resolution of the U-Net", network=UNET)
    layers_per_block: int = option(1, "residual blocks at each resolution", least=1, network=UNET)
    attention_resolutions: tuple[int, ...] = option((), "sides in pixels at which the U-Net has attention", network=UNET)
    hidden_size: int = option(384, "width of the transformer", least=1, network=TRANSFORMER)
    num_layers: int = option(12, "blocks of the transformer", least=1, network=TRANSFORMER)
    num_heads: int = option(6, "attention heads of each block", least=1, network=TRANSFORMER)
    patch_size: int = option(2, "side of the transformer's patches", least=1, network=TRANSFORMER)
    dropout: float = option(0.0, "share of activations dropped in the network", least=0, below=1)
    dropout_masks: str = option(
        "keyed", "keyed: the same masks on any number of ranks; torch: PyTorch's own dropout", one_of=MASKS
    )
    init_from: str = option("", "trained network to start from: a run's folder, a diffusers folder, or a name on the hub")
    lora_rank: int = option(0, "rank of a LoRA on the network of --init-from; 0 trains the whole network", least=0)

    @property
    def kind(self) -> str:
        """The kind of network, one of NETWORKS."""
        return network_of(self.family, self.transformer)


@dataclass(frozen=True)
class OptimizerConfig(Group):
    """How the network is trained. Lengths that end in kimg are thousands of images seen."""

    total_kimg: float = required("length of the training, in thousands of images seen", above=0)
    batch_size: int = option(64, "images in one optimizer step, of all ranks together", least=1)
    learning_rate: float = option(1e-3, "learning rate after its ramp", above=0)
    rampup_kimg: float = option(2.0, "length of the learning rate's linear ramp, in thousands of images seen", least=0)
    lr_decay: str = option(
        "constant", "how the learning rate changes after the ramp; cosine reaches 0 at the end", one_of=DECAYS
    )
    lr_decay_kimg: float = option(
        1000.0, "with inverse_sqrt: thousands of images seen at which the decay begins (EDM2)", above=0
    )
    betas: tuple[float, ...] = option((0.9, 0.999), "decay rates of Adam's two moments")
    weight_decay: float = option(0.0, "weight decay of AdamW, times the learning rate; 0 is Adam", least=0)
    clip_norm: float = option(0.0, "clip the norm of a step's gradients to this; 0 for no clipping", least=0)
    ema_halflife_kimg: float = option(500.0, "half-life of the averaged weights (EMA); they are measured and saved", above=0)
    ema_rampup_ratio: float | None = option(
        0.05, "limit the half-life to this share of the images seen; null for no limit", above=0
    )
    power_ema_stds: tuple[float, ...] = option(
        (), "relative widths of power-function averages that checkpoints keep besides, as 0.05,0.1, for `mlflow-icr ema`"
    )
    mixed_precision: str = option(
        "", "precision of training; empty: the launcher's, else no", one_of=("", "no", "bf16", "fp16")
    )
    gradient_accumulation_steps: int = option(1, "number of parts in which a batch is trained", least=1)
    gradient_checkpointing: bool = option(False, "recompute activations instead of keeping them: less memory, more time")
    compile: bool = option(False, "compile the network by inductor")
    cudnn_benchmark: bool = option(False, "let cuDNN time its algorithms for each shape, and take the fastest")


@dataclass(frozen=True)
class NoiseConfig(Group):
    """Noise levels of training, and what the network predicts."""

    p_mean: float = option(-1.2, "mean of ln sigma (Karras et al. 2022)", families=("edm",))
    p_std: float = option(1.2, "standard deviation of ln sigma", above=0, families=("edm",))
    sigma_data: float | None = option(
        None, "standard deviation of the training images or latents; null to measure it", above=0, families=("edm",)
    )
    prediction: str = option("epsilon", "what the network predicts", one_of=PREDICTIONS, families=("ddpm",))
    time_distribution: str = option("uniform", "distribution of training times t", one_of=TIMES, families=("flow",))
    time_mean: float = option(0.0, "with logit_normal: mean of ln t / (1 - t)", families=("flow",))
    time_std: float = option(1.0, "with logit_normal: its standard deviation", above=0, families=("flow",))
    time_shift: float = option(1.0, "factor on the odds t / (1 - t); above 1 means more noise", above=0, families=("flow",))
    beta_schedule: str = option(
        "linear", "diffusers' name of the schedule", one_of=("linear", "scaled_linear", "squaredcos_cap_v2"), families=("ddpm",)
    )
    beta_start: float = option(0.0001, "the schedule's first beta, where it is linear", above=0, below=1, families=("ddpm",))
    beta_end: float = option(0.02, "the schedule's last beta, where it is linear", above=0, below=1, families=("ddpm",))
    timesteps: int = option(1000, "number of timesteps of the schedule", least=2, families=("ddpm",))


@dataclass(frozen=True)
class MonitorConfig(Group):
    """What is measured, and when."""

    measurements: int = option(17, "number of measurements, in equal ratios of images seen", least=2)
    first_measurement_kimg: float = option(2.0, "thousands of images seen at the first measurement after step 0", above=0)
    layer: str = option("decoder", "layer whose features are read: decoder, mid, mid+1, ..., or a module's name")
    sigmas: tuple[float, ...] = option((0.29,), "noise standard deviations of the views")
    augmentation_level: int = option(3, "strength of the views' augmentations")
    probe_images: int = option(128, "number of training images that are measured")
    probe_views: int = option(0, "views of each measured image; 0 for as many as the layer's width needs")
    projection: int = option(0, "number of principal directions that are read; 0 for all dimensions")
    shrinkage: str = option("none", "shrinkage of the residual covariance: none, ledoit-wolf or oas")
    companions: tuple[str, ...] = option((), "further measures of the same features, such as alignment,rankme")
    measure_raw: bool = option(False, "measure the trained weights too, not only their average")
    stop_on: str = option("", "end the training at this verdict; empty: never", one_of=STOP_VERDICTS)
    generate_every: str = option(
        SUSPICION, "when samples are looked at: on suspicion and at the end, or every N measurements, counted from the last"
    )
    encoder: str = option("pixels", "encoder in which samples are compared; auto: efficientnet_lite0 if installed, else pixels")
    encoder_weights: str = option("", "file of the encoder's weights, where it needs one")
    num_samples: int = option(128, "number of samples to draw when samples are looked at", least=1)
    sample_steps: int = option(18, "solver steps of a sample", least=2)
    measure_batch: int = option(512, "views or images in one batch of a measurement; halved when memory runs out", least=1)
    sample_batch: int = option(256, "samples in one batch; halved when memory runs out", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "generate_every", str(self.generate_every))
        looks_every(self.generate_every)


@dataclass(frozen=True)
class RunConfig(Group):
    """Seed, checkpoints and logging."""

    seed: int = option(0, "seed of subset, initial weights, order and noise", least=0)
    checkpoints_total_limit: int = option(
        0, "number of checkpoints to keep, 0 for all; the newest, and those that may be the one to keep, always stay", least=0
    )
    save_every_minutes: float = option(15.0, "minutes between checkpoints, besides those at measurements; 0 for none", least=0)
    curve_every: int = option(50, "log loss, learning rate and speed every so many steps; 0 for never", least=0)
    log_models: str = option(
        "all", "checkpoints whose weights MLflow gets; kept: at the end, those at the turn and the newest", one_of=LOG_MODELS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed >= 2**63:  # the limit of torch's generators
            refuse("seed", self.seed, "a whole number below 2^63")
