"""Result files from checkpoints: each is written once, whole, and figures are made from them alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mlflow_icr import Denoiser, LabelledImages, frechet_distance, memorization_ratio, sweep_noise
from mlflow_icr.extraction.duplicates import pixel_hashes
from mlflow_icr.extraction.files import write_whole
from mlflow_icr.extraction.latents import LatentDenoiser
from mlflow_icr.extraction.pipelines import load_denoiser
from mlflow_icr.extraction.views import as_unit_interval
from mlflow_icr.generation.neighbours import k_nearest
from mlflow_icr.monitoring.generation import GenerationMonitor
from mlflow_icr.monitoring.grid import image_grid
from mlflow_icr.monitoring.neighbours import anchor_images, invariant_part, nearest
from mlflow_icr.representation import paired_difference
from mlflow_icr.tracking.checkpoints.folder import checkpoints
from trainers.data import DataSet, data_of
from trainers.experiments.paper import features as read
from trainers.experiments.paper.image_pages import LISTED
from trainers.experiments.paper.origins import image_rows, likeliest, own_errors, repeated_groups
from trainers.experiments.paper.plan import DUPLICATES, EDM_FEW, EDM_MANY, FLOW_FEW, FLOW_MANY, Scale, Training
from trainers.experiments.paper.trainings import config_of, is_done

LEVELS = (1, 2, 3, 4, 5)
PER_IMAGE = ("influence", "nearest", "copied")  # keys of step files that the results leave out


@dataclass(frozen=True)
class Folder:
    """Where a study's runs, result files and pictures are."""

    root: Path

    def run(self, training: Training) -> Path:
        """The output folder of a training."""
        return self.root / "runs" / training.name

    def result(self, training: Training, name: str) -> Path:
        """A result file of a training."""
        return self.root / "results" / training.name / f"{name}.json"


def once(path: Path, make: Callable[[], Any]) -> Any:
    """The content of a result file; made, and written whole, where it is not there yet."""
    if not path.exists():
        content = json.dumps(make(), indent=1, sort_keys=True) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(content.encode()))
    return json.loads(path.read_text())


def as_bytes(images: Tensor) -> Tensor:
    """Images (N, C, H, W) as uint8."""
    return (as_unit_interval(images) * 255).round().to(torch.uint8)


def unique_images(images: Tensor) -> tuple[list[int], list[int]]:
    """The places of the different images among (N, C, H, W), each its first, and how often each is there."""
    hashes = pixel_hashes(images)
    counts = Counter(hashes)
    first = {digest: i for i, digest in reversed(list(enumerate(hashes)))}
    order = sorted(first.values())
    return order, [counts[hashes[i]] for i in order]


class Measured:
    """One training with its checkpoints: measures what result files lack."""

    def __init__(self, scale: Scale, training: Training, folder: Folder) -> None:
        self.scale, self.training, self.folder = scale, training, folder
        self.config = config_of(folder.run(training))
        self.data: DataSet = data_of(self.config)
        # Without the untrained network, on which there is no statement.
        self.checkpoints = {step: path for step, path in sorted(checkpoints(folder.run(training)).items()) if step > 0}
        self.sigma = scale.sigma_flow if self.config.network.family == "flow" else scale.sigma
        # Repeated images count once, also where samples are compared with them.
        places, self.times = unique_images(self.data.train)
        self.unique, labels = self.data.train[places], self.data.train_labels
        self.images = self.unique[: scale.probe]
        self.labels = None if labels is None else labels[places][: scale.probe]

    def denoiser(self, step: int) -> Denoiser:
        """The denoiser of a checkpoint."""
        return load_denoiser(self.checkpoints[step])[0]

    def features(self, denoiser: Denoiser, layer: str = "decoder", level: int = 3, sigma: float | None = None) -> Tensor:
        """Features (N, K, D) of the probe images, at the scale's noise unless another is given."""
        views, noise = self.scale.views, self.sigma if sigma is None else sigma
        return read.read_features(denoiser, self.images, layer=layer, sigma=noise, views=views, level=level)

    def samples(self, denoiser: Denoiser) -> Tensor:
        """Generated images, uint8. Raises ValueError where one is not finite."""
        scale, classes = self.scale, self.data.train_labels if self.config.network.labels else None
        monitor = GenerationMonitor(
            denoiser, self.data.train, num_samples=scale.samples, num_steps=scale.sample_steps, labels=classes
        )
        return monitor.sample()

    def _copies(self, denoiser: Denoiser) -> dict[str, Any]:
        """Copies among samples by pixels, with exact bounds, and the Frechet distance of pixels to held-out images."""
        heldout = self.data.heldout
        try:
            flat = as_unit_interval(self.samples(denoiser)).flatten(1)
        except ValueError as error:
            return {"absent_samples": str(error)}
        copies = memorization_ratio(flat, as_unit_interval(self.unique).flatten(1))
        values: dict[str, Any] = {"copies": copies.value, "copies_low": copies.low, "copies_high": copies.high}
        values |= {"nearest": copies.nearest.tolist(), "copied": (copies.scores < copies.threshold).tolist()}
        if isinstance(denoiser, LatentDenoiser):  # at best it makes the images as the autoencoder decodes them
            decoded = denoiser.decode(denoiser.encode(as_unit_interval(self.unique) * 2 - 1))
            decoded_copies = memorization_ratio(flat, ((decoded.clamp(-1, 1) + 1) / 2).flatten(1))
            values |= {
                "copies_decoded": decoded_copies.value,
                "copies_decoded_low": decoded_copies.low,
                "copies_decoded_high": decoded_copies.high,
            }
        if len(heldout) > 1:
            values["frechet_pixels"] = frechet_distance(flat, as_unit_interval(heldout).flatten(1))
        return values

    def row(self, step: int) -> dict[str, Any]:
        """Everything of one checkpoint at the monitored layer and noise, and of its samples."""

        def make() -> dict[str, Any]:
            denoiser = self.denoiser(step)
            values = read.trajectory_values(self.features(denoiser), self.labels)
            return {"images_seen": step} | values | self._copies(denoiser)

        return dict(once(self.folder.result(self.training, f"step-{step:012d}"), make))

    def trajectory(self) -> list[dict[str, Any]]:
        """The rows of all checkpoints, each with the rise of its debiased ICR over the lowest, paired by image."""
        rows = [self.row(step) for step in self.checkpoints]
        after = [row for row in rows if row["images_seen"] > 0 and "icr_debiased" in row]
        if after:
            lowest = min(after, key=lambda row: row["icr_debiased"])
            base = torch.tensor(lowest["influence"], dtype=torch.float64)
            for row in after:
                rise = row["icr_debiased"] - lowest["icr_debiased"]
                influence = torch.tensor(row["influence"], dtype=torch.float64)
                low, high = paired_difference(base, influence, rise)
                row |= {"rise": rise, "rise_low": low, "rise_high": high}
        return [{key: value for key, value in row.items() if key not in PER_IMAGE} for row in rows]

    def origins(self) -> list[dict[str, Any]]:
        """A row for each image: when its own error ratio turned, its copies, and how typical it is."""

        def errors() -> list[dict[str, Any]]:
            rows = []
            for step in self.checkpoints:
                image, view = own_errors(self.denoiser(step), self.images, self.sigma)
                rows.append({"images_seen": step, "image_error": image.tolist(), "view_error": view.tolist()})
            return rows

        measured = list(once(self.folder.result(self.training, "own-errors"), errors))
        return image_rows(
            self.images, self.times, measured, [row for row in map(self.row, self.checkpoints) if "copied" in row]
        )

    def copies_picture(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """A picture: each row one of the likeliest copied images, the sample next to it, and its nearest others."""
        path = self.folder.result(self.training, "copies").with_suffix(".png")
        if not path.exists():
            samples = self.samples(self.denoiser(max(self.checkpoints)))
            flat_images = as_unit_interval(self.images).flatten(1)
            tiles = []
            for row in likeliest(rows, LISTED):
                near = k_nearest(flat_images[row["image"]][None], as_unit_interval(samples).flatten(1), 1).indices[0]
                tiles += [as_bytes(self.images[[row["image"]]]), samples[near], as_bytes(self.images[row["nearest"]])]
            grid = Image.fromarray(image_grid(torch.cat(tiles), 2 + len(rows[0]["nearest"])))
            write_whole(path, lambda file: grid.save(file, "PNG"))
        return str(path.relative_to(self.folder.root / "results"))

    def window(self, step: int) -> list[dict[str, Any]]:
        """ICR, energies and probe accuracy over noise levels, at the monitored layer."""

        def make() -> list[dict[str, Any]]:
            denoiser, scale = self.denoiser(step), self.scale
            noise_sweep = sweep_noise(denoiser, self.images, sigmas=scale.sigmas, layers=["decoder"], labelled=self._labelled())
            rows = []
            for point in noise_sweep.points:
                features = read.read_features(
                    denoiser, self.images, layer="decoder", sigma=point.sigma, views=noise_sweep.num_views
                )
                values: dict[str, Any] = {
                    "sigma": point.sigma,
                    "icr_debiased": point.icr,
                    "icr_low": point.low,
                    "icr_high": point.high,
                }
                values |= {"rise": point.rise, "rise_low": point.rise_low, "accuracy": point.accuracy}
                rows.append(values | read.energies(features))
            return rows

        return list(once(self.folder.result(self.training, f"window-{step:012d}"), make))

    def _labelled(self) -> LabelledImages | None:
        data, most = self.data, self.scale.labelled
        if data.train_labels is None or data.heldout_labels is None or len(data.heldout) < 2:
            return None
        # Held-out images, also for a model that was trained on few: half to learn from, and half to be scored on.
        half = len(data.heldout) // 2
        return LabelledImages(
            data.heldout[:half][:most], data.heldout_labels[:half][:most], data.heldout[half:], data.heldout_labels[half:]
        )

    def subsets(self, step: int) -> list[dict[str, Any]]:
        """ICR in two views of 16 to all images."""

        def make() -> list[dict[str, Any]]:
            denoiser = self.denoiser(step)
            images = self.data.train[: max(self.scale.subsets)]
            features = read.read_features(denoiser, images, layer="decoder", sigma=self.sigma, views=2)
            return read.subset_values(features, self.scale.subsets)

        return list(once(self.folder.result(self.training, f"subsets-{step:012d}"), make))

    def levels(self) -> list[dict[str, Any]]:
        """Debiased ICR of each checkpoint at each augmentation level."""
        return self._over("levels", {f"level {level}": {"level": level} for level in LEVELS})

    def layers(self) -> list[dict[str, Any]]:
        """Debiased ICR of each checkpoint at each of the layers."""
        return self._over("layers", {layer: {"layer": layer} for layer in self.scale.layers})

    def noises(self) -> list[dict[str, Any]]:
        """Debiased ICR of each checkpoint at less noise and at more, a third and three times as much."""
        return self._over("noises", {f"sigma {x:.2g}": {"sigma": x} for x in (self.sigma / 3, self.sigma * 3)})

    def _over(self, name: str, settings: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        def make() -> list[dict[str, Any]]:
            rows = []
            for step in self.checkpoints:
                denoiser = self.denoiser(step)
                for what, changes in settings.items():
                    values = read.contamination(self.features(denoiser, **changes))
                    values.pop("influence", None)
                    rows.append({"images_seen": step, "what": what} | values)
            return rows

        return list(once(self.folder.result(self.training, name), make))

    def neighbours(self, step: int) -> Path:
        """A picture: each row an image and its nearest by s, at one checkpoint."""
        path = self.folder.result(self.training, f"neighbours-{step:012d}").with_suffix(".png")
        if not path.exists():
            s = invariant_part(self.features(self.denoiser(step)))
            anchors = anchor_images(len(s))
            rows = torch.cat([anchors[:, None], nearest(s, anchors, read.NEIGHBOURS)], 1)
            grid = Image.fromarray(image_grid(as_bytes(self.images[rows.flatten()]), rows.shape[1]))
            write_whole(path, lambda file: grid.save(file, "PNG"))
        return path

    def neighbour_pictures(self, trajectory: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Pictures before, at and after the lowest ICR, by what they are; paths below the results' folder."""
        measured = [row for row in trajectory if row["images_seen"] > 0 and "icr_debiased" in row]
        if not measured:
            return {}
        lowest = min(measured, key=lambda row: row["icr_debiased"])
        steps = {"before": measured[0], "at the lowest ICR": lowest, "after": measured[-1]}
        root = self.folder.root / "results"
        return {what: str(self.neighbours(row["images_seen"]).relative_to(root)) for what, row in steps.items()}


def measure_all(
    scale: Scale, folder: Folder, wants_stop: Callable[[], bool], echo: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """The results of every training that has ended, by its name: the trajectory, and further ones of some."""
    results: dict[str, dict[str, Any]] = {}
    for training in scale.trainings():
        if wants_stop() or not is_done(folder.run(training)):  # result files are of all checkpoints of a run
            continue
        echo(f"measuring {training.name}")
        measured = Measured(scale, training, folder)
        result: dict[str, Any] = {"role": training.role, "seed": training.seed, "trajectory": measured.trajectory()}
        last = max(measured.checkpoints)
        first = training.seed == scale.seeds[0]
        if first and training.role in (EDM_FEW, EDM_MANY, FLOW_MANY):
            result["window"] = measured.window(last)
        if training.role in (EDM_FEW, DUPLICATES):
            result["origins"] = measured.origins()
        if training.role == DUPLICATES:
            result["groups"] = [len(group) for group in repeated_groups(measured.data.train)]
        if first and training.role in (EDM_FEW, DUPLICATES):
            result["copies_picture"] = measured.copies_picture(result["origins"])
        if first and training.role in (EDM_FEW, FLOW_FEW):
            result["noises"] = measured.noises()
        if first and training.role == EDM_FEW:
            result |= {"levels": measured.levels(), "layers": measured.layers()}
            result["neighbours"] = measured.neighbour_pictures(result["trajectory"])
        if first and training.role == EDM_MANY:
            result["subsets"] = measured.subsets(last)
        results[training.name] = result
    return results
