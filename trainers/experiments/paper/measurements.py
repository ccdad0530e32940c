"""Result files from checkpoints: each is written once, whole, and figures are made from them alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mlflow_icr import Denoiser, LabelledImages, frechet_distance, memorization_ratio, sweep_noise
from mlflow_icr.extraction.files import write_whole
from mlflow_icr.extraction.pipelines import load_denoiser
from mlflow_icr.extraction.views import as_unit_interval
from mlflow_icr.monitoring.generation import GenerationMonitor
from mlflow_icr.monitoring.grid import image_grid
from mlflow_icr.monitoring.neighbours import anchor_images, invariant_part, nearest
from mlflow_icr.representation import paired_difference
from mlflow_icr.tracking.checkpoints.folder import checkpoints
from trainers.data import DataSet, data_of
from trainers.experiments.paper import features as read
from trainers.experiments.paper.plan import EDM_FEW, Scale, Training
from trainers.experiments.paper.trainings import config_of

LEVELS = (1, 2, 3, 4, 5)


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


class Measured:
    """One training with its checkpoints: measures what result files lack."""

    def __init__(self, scale: Scale, training: Training, folder: Folder) -> None:
        self.scale, self.training, self.folder = scale, training, folder
        self.config = config_of(folder.run(training))
        self.data: DataSet = data_of(self.config)
        self.checkpoints = dict(sorted(checkpoints(folder.run(training)).items()))
        self.sigma = scale.sigma_flow if self.config.network.family == "flow" else scale.sigma
        self.images = self.data.train[: scale.probe]
        self.labels = None if self.data.train_labels is None else self.data.train_labels[: scale.probe]

    def denoiser(self, step: int) -> Denoiser:
        """The denoiser of a checkpoint."""
        return load_denoiser(self.checkpoints[step])[0]

    def features(self, denoiser: Denoiser, layer: str = "decoder", level: int = 3) -> Tensor:
        """Features (N, K, D) of the probe images."""
        views = self.scale.views
        return read.read_features(denoiser, self.images, layer=layer, sigma=self.sigma, views=views, level=level)

    def _samples(self, denoiser: Denoiser, step: int) -> dict[str, Any]:
        """Copies among samples by pixels, with exact bounds, and the Frechet distance of pixels to held-out images."""
        scale, heldout = self.scale, self.data.heldout
        classes = self.data.train_labels if self.config.network.labels else None
        monitor = GenerationMonitor(
            denoiser, self.data.train, num_samples=scale.samples, num_steps=scale.sample_steps, labels=classes
        )
        try:
            samples = monitor.sample()
        except ValueError as error:
            return {"absent_samples": str(error)}
        flat = as_unit_interval(samples).flatten(1)
        copies = memorization_ratio(flat, as_unit_interval(self.data.train).flatten(1))
        found: dict[str, Any] = {"copies": copies.value, "copies_low": copies.low, "copies_high": copies.high}
        if len(heldout) > 1:
            found["frechet_pixels"] = frechet_distance(flat, as_unit_interval(heldout).flatten(1))
        return found

    def row(self, step: int) -> dict[str, Any]:
        """Everything of one checkpoint at the monitored layer and noise, and of its samples."""

        def make() -> dict[str, Any]:
            denoiser = self.denoiser(step)
            values = read.trajectory_values(self.features(denoiser), self.labels)
            return {"images_seen": step} | values | self._samples(denoiser, step)

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
        return [{key: value for key, value in row.items() if key != "influence"} for row in rows]

    def window(self, step: int) -> list[dict[str, Any]]:
        """ICR, energies and probe accuracy over noise levels, at the monitored layer."""

        def make() -> list[dict[str, Any]]:
            denoiser, scale = self.denoiser(step), self.scale
            found = sweep_noise(denoiser, self.images, sigmas=scale.sigmas, layers=["decoder"], labelled=self._labelled())
            rows = []
            for point in found.points:
                features = read.read_features(denoiser, self.images, layer="decoder", sigma=point.sigma, views=found.num_views)
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
        # Of a model that was trained on few images too: held-out ones, half to learn from and half to be scored on.
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

    def _over(self, name: str, settings: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        def make() -> list[dict[str, Any]]:
            rows = []
            for step in self.checkpoints:
                denoiser = self.denoiser(step)
                for what, chosen in settings.items():
                    values = read.contamination(self.features(denoiser, **chosen))
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
            shown = (as_unit_interval(self.images) * 255).round().to(torch.uint8)
            grid = Image.fromarray(image_grid(shown[rows.flatten()], rows.shape[1]))
            write_whole(path, lambda file: grid.save(file, "PNG"))
        return path

    def neighbour_pictures(self, trajectory: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Pictures before, at and after the lowest ICR, by what they are; paths below the results' folder."""
        known = [row for row in trajectory if row["images_seen"] > 0 and "icr_debiased" in row]
        if not known:
            return {}
        lowest = min(known, key=lambda row: row["icr_debiased"])
        steps = {"before": known[0], "at the lowest ICR": lowest, "after": known[-1]}
        root = self.folder.root / "results"
        return {what: str(self.neighbours(row["images_seen"]).relative_to(root)) for what, row in steps.items()}


def measure_all(
    scale: Scale, folder: Folder, wants_stop: Callable[[], bool], say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """The results of every training that has checkpoints, by its name: trajectory, and what only some have."""
    found: dict[str, dict[str, Any]] = {}
    for training in scale.trainings():
        if wants_stop() or not checkpoints(folder.run(training)):
            continue
        say(f"measuring {training.name}")
        measured = Measured(scale, training, folder)
        result: dict[str, Any] = {"role": training.role, "seed": training.seed, "trajectory": measured.trajectory()}
        last = max(measured.checkpoints)
        if training.seed == scale.seeds[0]:
            result["window"] = measured.window(last)
        if training.role == EDM_FEW and training.seed == scale.seeds[0]:
            result |= {"levels": measured.levels(), "layers": measured.layers()}
            result["neighbours"] = measured.neighbour_pictures(result["trajectory"])
        if training.name == f"edm-many-seed{scale.seeds[0]}":
            result["subsets"] = measured.subsets(last)
        found[training.name] = result
    return found
