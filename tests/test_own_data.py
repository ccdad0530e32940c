"""Somebody's own images train, are measured and reported from one line, whatever files they come in; whose are held out."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mlflow_icr.extraction.denoisers import device_of
from mlflow_icr.extraction.images import ImageFiles, content_hash
from mlflow_icr.extraction.pipelines import load_denoiser
from mlflow_icr.tracking import read_history
from mlflow_icr.tracking.checkpoints.folder import checkpoint_path
from tests.image_files import write_dicom, write_tiff
from tests.test_data import CIFAR
from tests.training import process_as_it_was
from trainers import train
from trainers.batches import Order, draw_batch
from trainers.config import config_from, load_config, read_values
from trainers.data import DataFacts, data_of, facts_of, load_data, split_groups
from trainers.families import family_of
from trainers.inputs import Inputs, as_input
from trainers.plan import device_here, plan_for

# Without a preset: what is not said here follows from the data and the device.
TINY = [
    "--encoder=pixels", "--num-images=12", "--num-heldout=4", "--total-kimg=0.064", "--first-measurement-kimg=0.032",
    "--measurements=2", "--block-channels=8,16", "--num-samples=12", "--sample-steps=2", "--batch-size=16", "--probe-views=3",
    "--probe-images=12", "--generate-every=1", "--log-models=none",
]  # fmt: skip


def smooth(count: int, height: int, width: int, top: int) -> np.ndarray:
    """Images (N, H, W) of whole numbers up to `top`, each a ramp of its own."""
    y, x = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(0)
    a, b, c = rng.uniform(0, 0.3, (3, count, 1, 1))
    return ((a * y / height + b * x / width + c) * top).round()


def twelve_bits(folder: Path) -> tuple[Path, list[str]]:
    for i, image in enumerate(smooth(16, 8, 8, 4095).astype(np.uint16)):
        write_tiff(folder / f"{i:02}.tif", image)
    return folder, []


def rectangles(folder: Path) -> tuple[Path, list[str]]:
    for i, image in enumerate(smooth(16, 24, 40, 255).astype(np.uint8)):
        Image.fromarray(np.dstack([image, image // 2, 255 - image])).save(folder / f"{i:02}.jpg")
    return folder, []


def slices_by_patient(folder: Path) -> tuple[Path, list[str]]:
    for i, image in enumerate(smooth(20, 8, 8, 4000).astype(np.int16)):
        write_dicom(folder / f"{i:04}", image, RescaleSlope=1, RescaleIntercept=-1024, PatientID=f"p{i // 4}")
    return folder, ["--value-range", "-1000", "3000"]


def parquet(folder: Path) -> tuple[Path, list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = []
    for image in smooth(16, 8, 8, 255).astype(np.uint8):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    pq.write_table(pa.table({"image": cells, "label": [i % 3 for i in range(16)]}), folder / "train.parquet")
    return folder / "train.parquet", ["--labels"]


def archive(folder: Path) -> tuple[Path, list[str]]:
    if not CIFAR.exists():
        pytest.skip(f"{CIFAR} is not here")
    return CIFAR, ["--resolution=8"]


@pytest.mark.usefixtures("few_errors")
@pytest.mark.parametrize("make", [twelve_bits, rectangles, slices_by_patient, parquet, archive])
def test_a_set_trains_and_is_measured_from_one_line(
    make: Callable[[Path], tuple[Path, list[str]]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    data, flags = make(tmp_path / "data")
    out = tmp_path / "out"
    with process_as_it_was():
        assert train.main([*TINY, f"--data={data}", f"--output-dir={out}", *flags]) == 0
    rows = read_history(out)
    assert [row["images_seen"] for row in rows] == [0, 32, 64]
    assert {"repr/icr", "mem/ratio_l2", "gen/fd_pixels", "loss/heldout", "repr/view_error_ratio"} <= set(rows[-1])
    assert (out / "report" / "index.html").exists()
    denoiser, size = load_denoiser(checkpoint_path(out, 64), trust_remote_code=True)
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.zeros(1, denoiser.network.config.in_channels, height, width, device=device_of(denoiser))
    assert denoiser(x, 1.0).shape == x.shape
    # 24x40 within 32, by multiples of 4, where there is no GPU.
    rectangle = (16, 32) if device_here().kind == "cpu" else (24, 40)
    assert (height, width) == (rectangle if make is rectangles else (8, 8))
    if make is slices_by_patient:
        assert read_values(out / "config.yaml")["group_by"] == "patient"
    if make is twelve_bits:
        assert "so 0 is black and 4095 white (12 bits)" in caplog.text


def test_the_facts_of_a_set(tmp_path: Path) -> None:
    for name, image in (("a/1", (9, 5)), ("a/2", (9, 5)), ("b/3", (4, 4))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", image[::-1]).save(tmp_path / f"{name}.png")
    assert facts_of(str(tmp_path)) == DataFacts(3, (9, 5), 3, 2)
    assert facts_of("digits") == DataFacts(1797, (8, 8), 1, 10)


def test_a_plan_keeps_groups_together(tmp_path: Path) -> None:
    for i in range(40):  # 8 patients of 5 images each, in folders of 20
        place = tmp_path / str(i // 20) / f"{i:02}.dcm"
        place.parent.mkdir(exist_ok=True)
        write_dicom(place, np.full((8, 8), i, np.uint16), PatientID=f"p{i // 5}")
    for given, group_by, images in (({}, "patient", 35), ({"group_by": "folder"}, "folder", 20), ({"group_by": ""}, "", 36)):
        values, _ = plan_for({"data": str(tmp_path), **given})
        assert [values[key] for key in ("group_by", "num_heldout", "num_images")] == [group_by, 4, images]
        data = data_of(config_from({**values, "encoder": "pixels"}))
        assert (len(data.train), len(data.heldout)) == (images, 4)


def test_a_saved_rectangle_is_sampled_by_plain_diffusers(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    for preset in ("digits", "fashion-mnist-ddpm"):
        config = load_config(preset, {"resolution": "8x12", "block_channels": [8, 16], "attention_resolutions": []})
        family = family_of(config, None)
        network = family.build(3, (8, 12))
        family.save(tmp_path / preset, network)
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / preset, trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 12, 3)


def test_what_a_rectangle_cannot_be_is_one_line() -> None:
    for changes, message in (
        ({"resolution": "8x12", "family": "flow"}, "resolution is '8x12'; expected a square for family flow"),
        ({"resolution": "8x13"}, "resolution is 8x13; expected a multiple of 2 for 2 blocks"),
        ({"resolution": "8x"}, "resolution is '8x'; expected a side in pixels, or HEIGHTxWIDTH"),
        ({"value_range": [3.0, 1.0]}, r"value_range is \(3.0, 1.0\); expected two numbers, the lower one first"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config("digits", changes)


def test_held_out_images_are_of_other_groups_and_subsets_nest(tmp_path: Path) -> None:
    for patient in range(8):
        for i in range(patient + 2):
            folder = tmp_path / f"p{patient}" / "scan"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), patient * 16 + i, np.uint8)).save(folder / f"{i}.png")

    def groups(images: Tensor) -> set[int]:
        return {int(value) // 16 for value in images[:, 0, 0, 0]}

    for by in ("folder", r"^(p\d+)/"):
        small, large = (
            load_data(str(tmp_path), resolution=8, num_images=n, num_heldout=7, seed=1, group_by=by) for n in (10, 25)
        )
        assert torch.equal(large.train[:10], small.train)
        assert torch.equal(large.heldout, small.heldout)
        assert len(large.heldout) == 7
        assert not groups(large.train) & groups(large.heldout)
        assert large.train_labels is None  # the folders are patients, not classes
    with pytest.raises(ValueError, match="num_images is 40; expected at most"):
        load_data(str(tmp_path), resolution=8, num_images=40, num_heldout=4, seed=1, group_by="folder")
    with pytest.raises(ValueError, match=r"group_by is 'x\(\\\\d\)': no match in 44 of 44 files: p0/scan/0.png"):
        load_data(str(tmp_path), resolution=8, num_images=4, num_heldout=4, seed=1, group_by=r"x(\d)")
    with pytest.raises(ValueError, match=r"group_by is '\('; expected folder, file, patient, or a regular expression"):
        load_data(str(tmp_path), resolution=8, num_images=4, num_heldout=4, seed=1, group_by="(")
    with pytest.raises(ValueError, match="takes all 1 groups"):
        split_groups(torch.arange(4), ["a"] * 4, 1, 0)


def test_what_may_be_meant_otherwise_is_said(tmp_path: Path) -> None:
    for i in range(6):
        write_dicom(tmp_path / f"{i}.dcm", np.full((8, 8), 100 * (i // 2 + 1), np.uint16), PatientID="p")
    data = load_data(str(tmp_path), resolution=8, num_images=4, num_heldout=2, seed=0)
    assert any("--group-by patient" in note for note in data.notes)
    assert any("exact duplicates" in note or "held out too" in note for note in data.notes)
    assert any("300" in note and "(9 bits)" in note for note in data.notes)


def test_inputs_that_stay_on_the_host_train_the_same(rng: np.random.Generator) -> None:
    """Rows that are gathered one batch ahead are those that a device would have taken."""
    config = load_config("digits", {"num_images": 20, "batch_size": 16})
    family = family_of(config, None)
    deep = torch.from_numpy(rng.integers(0, 65536, (20, 1, 8, 8), dtype=np.uint16))
    for images in (deep, deep.float() / 65535, (deep.int() // 256).to(torch.uint8)):
        there, kept = (
            draw_batch(inputs, Order(20, 0), family, 32).clean(inputs)
            for inputs in (Inputs(images), Inputs(images, on_host=True))
        )
        assert torch.equal(there, kept)
        assert there.dtype == torch.float32
        assert torch.equal(as_input(images).amax(), torch.tensor(2.0) * images.float().max() / _top(images) - 1)


def _top(images: Tensor) -> float:
    return 1.0 if images.is_floating_point() else float(torch.iinfo(images.dtype).max)


def test_files_are_listed_once_and_read_in_place(tmp_path: Path) -> None:
    """The bytes that are trained on are those of the files, in the order of the subset."""
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    data = load_data(str(tmp_path / "images.npy"), resolution=8, num_images=9, num_heldout=0, seed=3)
    assert {image.numpy().tobytes() for image in data.train} == {image.tobytes() for image in images}
    assert data.train_sha256 == content_hash(data.train)
    assert len(ImageFiles(tmp_path / "images.npy")) == 9
