"""A pipeline from noise to images, with or without latents and classes, for models that diffusers has no pipeline for.

This file is copied into the folders of such models and needs diffusers and torch alone:
DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).
"""

from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class NoiseToImagePipeline(DiffusionPipeline):  # type: ignore[misc]
    """A U-Net or a DiT transformer, a scheduler (EDM, DDPM or flow matching), and with latents their autoencoder.

    The last entry of the network's table of classes is the null class, which stands for none.
    """

    _optional_components: ClassVar[list[str]] = ["unet", "transformer", "vae"]
    model_cpu_offload_seq = "unet->transformer->vae"

    def __init__(self, scheduler: Any, unet: Any = None, transformer: Any = None, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer, vae=vae)

    def _null_class(self, network: Any) -> int | None:
        if self.transformer is not None:
            return int(network.config.num_embeds_ada_norm)
        entries = network.config.num_class_embeds
        return None if entries is None else int(entries) - 1

    def _decode(self, x: torch.Tensor) -> torch.Tensor:
        if self.vae is None:
            return x
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            mean, std = [getattr(config, "shift_factor", None) or 0.0], [1.0]
        shift, scale = (torch.tensor(values).to(x).view(1, -1, 1, 1) for values in (mean, std))
        return self.vae.decode(x / config.scaling_factor * scale + shift).sample

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: list[int] | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Images, one of each of `class_labels`, or `batch_size` of no class; guided by classes where guidance_scale > 1."""
        network = self.transformer if self.transformer is not None else self.unet
        null, device = self._null_class(network), self._execution_device
        if class_labels is not None and (null is None or not all(0 <= label <= null for label in class_labels)):
            allowed = "none: the model has no classes" if not null else f"numbers from 0 to {null}, which stands for no class"
            raise ValueError(f"class_labels is {class_labels!r}; expected {allowed}")
        count = batch_size if class_labels is None else len(class_labels)
        guided = guidance_scale > 1 and class_labels is not None
        conditions = {}
        if null is not None:
            labels = [null] * count if class_labels is None else list(class_labels)
            conditions["class_labels"] = torch.tensor(labels + [null] * count * guided, device=device)
        config = network.config
        size = config.sample_size
        shape = (count, config.in_channels, *([size, size] if isinstance(size, int) else size))
        x = randn_tensor(shape, generator=generator, device=device, dtype=network.dtype)
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        # Solvers for ODEs take no generator of noise.
        noisy = {} if "FlowMatch" in type(self.scheduler).__name__ else {"generator": generator}
        for t in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
            scaled = torch.cat([scaled] * (1 + guided))
            times = t.to(device).expand(len(scaled))
            output = network(scaled.to(network.dtype), times, return_dict=False, **conditions)[0]
            if guided:
                conditional, unconditional = output.chunk(2)
                output = unconditional + guidance_scale * (conditional - unconditional)
            x = self.scheduler.step(output, t, x, return_dict=False, **noisy)[0]
        images: Any = (self._decode(x.to(network.dtype)) / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
