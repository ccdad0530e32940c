"""Folders as people have them: links, several splits, formats that are not read, arrays and tables of other programs."""

from __future__ import annotations

import io
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlflow_icr.extraction.images import ImageFiles, Read, Reading, image_paths, load_folder, read_whole
from tests.image_files import write_dicom, write_png
from trainers.data import facts_of, usual_size
from trainers.plan import plan_for


def some(count: int = 1, side: int = 8) -> np.ndarray:
    """Images (N, H, W) of bytes, all different."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side), dtype=np.uint8)


def write_some(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(some(count)):
        write_png(folder / f"{i}.png", image)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def read(path: Path, size: tuple[int, int] = (8, 8)) -> Read:
    files = ImageFiles(path)
    return read_whole(files, range(len(files)), Reading(size))


def test_links_are_followed_once_and_broken_ones_are_named(tmp_path: Path) -> None:
    write_some(tmp_path / "elsewhere" / "deep", 3)
    write_some(tmp_path / "data", 2)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")  # a circle
    (tmp_path / "data" / "latest").symlink_to(tmp_path / "nowhere")
    assert ImageFiles(tmp_path / "data").names == ["0.png", "1.png", *(f"linked/deep/{i}.png" for i in range(3))]
    (tmp_path / "data" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"1 of 6 images cannot be read: gone.png"):
        load_folder(tmp_path / "data", 8)
    assert len(image_paths(tmp_path / "data")) == 5


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    write_some(tmp_path, 2)
    (tmp_path / "@eaDir").mkdir()
    for name in ("a.heic", "b.HEIC", "caption.txt", ".hidden.heic", "@eaDir/thumb.jpg"):
        (tmp_path / name).write_bytes(b"...")
    assert ImageFiles(tmp_path).notes == [f"{str(tmp_path)!r}: its 2 images are taken, and 2 .heic files left aside"]
    for path in image_paths(tmp_path):
        path.unlink()
    with pytest.raises(ValueError, match=r"holds no images \(.*\) among its files: 2 .heic, 1 .txt$"):
        ImageFiles(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere' is not there; expected a folder"):
        ImageFiles(tmp_path / "nowhere")
    (tmp_path / "two\nlines.png").touch()
    (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()
    with pytest.raises(ValueError, match=r"caf\\udce9.png \(an empty file\); two\\nlines.png \(an empty file\)$") as caught:
        load_folder(tmp_path, 8)
    assert caught.value.args[0].isprintable()
    for path in image_paths(tmp_path):
        path.unlink()
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match=r"empty.png \(an empty file\)$"):
        load_folder(tmp_path, 8)


def test_animations_count_once_and_a_line_says_so(tmp_path: Path) -> None:
    first, second = (Image.fromarray(image) for image in some(2))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    second.save(tmp_path / "b.png")
    found = read(tmp_path)
    assert np.array_equal(found.images[0, 0], np.asarray(first))
    assert found.notes == [f"{str(tmp_path)!r}: 1 of 2 images are animations; their first pictures are taken"]


def test_a_turned_tiff_stands_upright_as_a_png_does(tmp_path: Path) -> None:
    import tifffile

    stored = some(1, 12)[0, :8]
    for orientation in range(1, 9):
        image = Image.fromarray(stored)
        exif = image.getexif()
        exif[274] = orientation
        (tmp_path / str(orientation)).mkdir()
        image.save(tmp_path / str(orientation) / "a.png", exif=exif)
        tifffile.imwrite(
            tmp_path / f"{orientation}.tif", stored.astype(np.uint16) * 257, extratags=[(274, "H", 1, orientation, True)]
        )
        size = (8, 12) if orientation < 5 else (12, 8)
        upright = read(tmp_path / str(orientation), size).images.numpy()
        assert np.array_equal(read(tmp_path / f"{orientation}.tif", size).images.numpy(), upright.astype(np.uint16) * 257)


def test_masks_beside_images_are_no_images(tmp_path: Path) -> None:
    for patient in "ab":
        write_some(tmp_path / patient / "Images", 3)
        write_some(tmp_path / patient / "masks", 4)
    files = ImageFiles(tmp_path)
    assert len(files) == 6
    assert files.notes == [f"{str(tmp_path)!r}: 8 files in folders of masks or annotations, beside images, are left aside"]
    assert len(ImageFiles(tmp_path / "a" / "masks")) == 4  # asked for
    write_some(tmp_path / "classes" / "labels", 2)
    assert len(ImageFiles(tmp_path / "classes")) == 2  # without images beside them


def test_of_several_splits_one_is_taken(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for name in "ab":
            write_some(tmp_path / split / name, count)
    files = ImageFiles(tmp_path)
    assert len(files) == 6
    assert files.notes == [f"{str(tmp_path)!r}: its 6 files of the split train are taken, and 4 of validation left aside"]
    assert facts_of(str(tmp_path)).num_classes == 2  # a and b, not train and val
    assert facts_of(str(tmp_path), "validation").num_images == len(ImageFiles(tmp_path, split="val")) == 4
    with pytest.raises(ValueError, match="data_split is 'test'; expected one of train, validation"):
        facts_of(str(tmp_path), "test")
    with pytest.raises(ValueError, match=r"data_split is 'test', but .* has no splits"):
        facts_of(str(tmp_path / "train"), "test")


def test_arrays_of_other_programs(tmp_path: Path) -> None:
    images, labels = some(20), (np.arange(20) % 3)[:, None]
    mnist = {"val_images": images[:5], "train_images": images, "train_labels": labels, "val_labels": labels[:5]}
    np.savez(tmp_path / "MED.npz", **mnist)
    (tmp_path / "MED.npz").rename(tmp_path / "MED.NPZ")
    files = ImageFiles(tmp_path / "MED.NPZ")
    found = files.labels()
    assert len(files) == 20
    assert found is not None
    assert found.tolist() == labels[:, 0].tolist()
    assert "read from 'train_images', and not from val_images: (20, 8, 8) as 20 grey images" in files.notes[0]
    np.savez(tmp_path / "o.npz", images=images, meta=np.array([{"a": 1}], dtype=object))
    assert np.array_equal(read(tmp_path / "o.npz").images[:, 0], images)
    np.savez(tmp_path / "o.npz", images=np.array([images[0], None], dtype=object))
    with pytest.raises(ValueError, match=r"an array of Python objects, which would have to be unpickled"):
        ImageFiles(tmp_path / "o.npz")


def test_tables_of_other_programs(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = some(6)
    cells = [png(image) for image in images]
    pq.write_table(pa.table({"md5": [b"x" * 16] * 6, "Image": cells}), tmp_path / "a.parquet")
    assert np.array_equal(read(tmp_path / "a.parquet").images[:, 0], images)
    for texts, expected in ((["dog", "cat"] * 3, [1, 0] * 3), ([f"caption {i}" for i in range(6)], None), ([-1] * 6, None)):
        pq.write_table(pa.table({"image": cells, "label": texts}), tmp_path / "b.parquet")
        found = ImageFiles(tmp_path / "b.parquet").labels()
        assert (None if found is None else found.tolist()) == expected
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": cell, "path": None} for cell in cells], "label": [0, 1] * 3}
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(str(tmp_path / "saved"))
    found = ImageFiles(tmp_path / "saved").labels()
    assert np.array_equal(read(tmp_path / "saved").images[:, 0], images)
    assert found is not None
    assert found.tolist() == rows["label"]


def test_dicom_of_other_programs(tmp_path: Path) -> None:
    import pydicom
    from pydicom.uid import JPEGLSLossless

    stored = some()[0].astype(np.int16) - 50
    write_dicom(tmp_path / "a.dcm", stored, RescaleSlope="", RescaleIntercept="")
    (tmp_path / "a.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[132:])  # no preamble
    found = read(tmp_path).images[0, 0].numpy() / 65535 * np.ptp(stored) + stored.min()
    assert np.array_equal(found.round(), stored)
    deep = np.random.default_rng(0).integers(0, 4000, (8, 8)).astype(np.uint16)
    write_dicom(tmp_path / "a.dcm", deep, PhotometricInterpretation="MONOCHROME1")  # of 16 bits, of which few are used
    inverted = read(tmp_path).images[0, 0].numpy()
    np.testing.assert_allclose(inverted / 65535, (deep.max() - deep) / np.ptp(deep), atol=1e-4)
    ds = pydicom.dcmread(tmp_path / "a.dcm")
    ds.file_meta.TransferSyntaxUID = JPEGLSLossless
    ds.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    ds["PixelData"].is_undefined_length = True
    ds.save_as(tmp_path / "a.dcm")
    with pytest.raises(ValueError, match=r"packed by JPEG-LS Lossless Image Compression: pip install 'pylibjpeg\[all\]'"):
        load_folder(tmp_path, 8)
    del ds.PixelData
    ds.save_as(tmp_path / "a.dcm")
    with pytest.raises(ValueError, match=r"a.dcm \(without PixelData\)"):
        load_folder(tmp_path, 8)


def test_a_set_of_many_sizes_has_a_usual_one(tmp_path: Path) -> None:
    assert usual_size(Counter({(9, 16): 5, (3, 4): 4})) == (9, 16)
    assert usual_size(Counter({(90, 160): 1, (60, 120): 1, (75, 100): 1})) == (75, 120)  # all are wide
    mixed = Counter({(i, j): 1 for i, j in ((10, 30), (100, 300), (300, 100), (110, 300), (500, 120))})
    assert usual_size(mixed) == (100, 100)


def test_what_cannot_be_planned_names_its_cause(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data is '/nowhere/photos', which is not there; expected a folder, a .zip, or"):
        plan_for({"data": "/nowhere/photos"})
    (tmp_path / "photos.tar").write_bytes(b"...")
    with pytest.raises(ValueError, match=r"photos.tar', a file of a kind that is not read; expected a folder, a .zip, or"):
        plan_for({"data": str(tmp_path / "photos.tar")})
    write_some(tmp_path, 12)
    data = {"data": str(tmp_path)}
    assert plan_for({**data, "skip_images": 4, "num_heldout": 2})[0]["num_images"] == 6
    with pytest.raises(ValueError, match=r"num_heldout is 11; data '.*' has 12 images, of which 1 remain to train on"):
        plan_for({**data, "num_heldout": 11})
