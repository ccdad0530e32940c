"""Images of every kind of file are read as their own libraries wrote them; no value is lost, and what is bad is named."""

from __future__ import annotations

import io
import resource
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlflow_icr.extraction.images import ImageFiles, Read, Reading, load_folder, read_items, read_whole
from tests.image_files import write_dicom, write_png, write_tiff

TWELVE = (np.arange(64 * 64) % 4096).reshape(64, 64).astype(np.uint16)


def read(path: Path, size: tuple[int, int] = (64, 64), **options: object) -> Read:
    files = ImageFiles(path)
    return read_whole(files, range(len(files)), Reading(size, **options))  # type: ignore[arg-type]


def as_values(images: torch.Tensor, low: float, high: float) -> np.ndarray:
    """What the images' files held, if `low` is black and `high` white."""
    whole = torch.iinfo(images.dtype).max if not images.is_floating_point() else 1
    return images.numpy().astype(np.float64) / whole * (high - low) + low


@pytest.mark.parametrize(("write", "suffix"), [(write_png, ".png"), (write_tiff, ".tif")])
def test_twelve_bits_keep_all_their_levels(write: Callable[[Path, np.ndarray], None], suffix: str, tmp_path: Path) -> None:
    write(tmp_path / f"a{suffix}", TWELVE)
    write(tmp_path / f"b{suffix}", TWELVE[::-1] // 2)
    found = read(tmp_path)
    assert found.images.dtype == torch.uint16
    assert len(found.images[0].view(torch.int16).unique()) == 4096
    values = as_values(found.images, 0, 4095)
    np.testing.assert_allclose(values[0, 0], TWELVE, atol=4095 / 65535 / 2)
    np.testing.assert_array_equal(values[1, 0].round(), TWELVE[::-1] // 2)
    assert found.notes == [f"{str(tmp_path)!r}: values from 0 to 4095, so 0 is black and 4095 white (12 bits); another choice: "
                           "--value-range LOW HIGH"]  # fmt: skip


def test_a_subset_has_the_scale_of_the_whole_set(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", TWELVE // 16)
    write_tiff(tmp_path / "b.tif", TWELVE)
    files = ImageFiles(tmp_path)
    both = read_whole(files, [0, 1], Reading((64, 64))).images
    assert torch.equal(read_whole(files, [0], Reading((64, 64))).images, both[:1])


def test_bits_that_a_file_states_are_believed(tmp_path: Path) -> None:
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", TWELVE // 8, extratags=[(281, 3, 1, 4095, True)])  # MaxSampleValue
    found = read(tmp_path)
    np.testing.assert_array_equal(as_values(found.images, 0, 4095).round()[0, 0], TWELVE // 8)
    assert "as the files state" in found.notes[0]


def test_floats_keep_their_precision_and_a_range_may_be_given(tmp_path: Path, rng: np.random.Generator) -> None:
    values = rng.normal(0, 500, (2, 64, 64)).astype(np.float32)
    for i, value in enumerate(values):
        write_tiff(tmp_path / f"{i}.tif", value)
    found = read(tmp_path)
    assert found.images.dtype == torch.float32
    np.testing.assert_allclose(as_values(found.images, values.min(), values.max())[:, 0], values, rtol=1e-5, atol=1e-3)
    given = read(tmp_path, value_range=(-100.0, 100.0))
    expected = np.clip((values + 100) / 200, 0, 1)
    np.testing.assert_allclose(given.images[:, 0], expected, atol=1e-6)
    share = float((abs(values) > 100).mean() * 100)
    assert given.notes == [
        f"{str(tmp_path)!r}: {share:.3g} % of the values are outside the range, and are cut off to black and white"
    ]


def test_colours_and_channels_of_any_depth(tmp_path: Path, rng: np.random.Generator) -> None:
    import imagecodecs

    deep = rng.integers(0, 65536, (8, 12, 3), dtype=np.uint16)
    for name in ("png", "tiff", "five", "planes", "npy"):
        (tmp_path / name).mkdir()
    (tmp_path / "png" / "a.png").write_bytes(imagecodecs.png_encode(deep))
    write_tiff(tmp_path / "tiff" / "a.tif", deep)
    five = rng.integers(0, 65536, (8, 12, 5), dtype=np.uint16)
    import tifffile

    tifffile.imwrite(tmp_path / "five" / "a.tif", five, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "planes" / "a.tif", five.transpose(2, 0, 1), photometric="minisblack", planarconfig="separate")
    np.save(tmp_path / "npy" / "a.npy", deep)
    for name, expected in (("png", deep), ("tiff", deep), ("five", five), ("planes", five), ("npy", deep)):
        found = read(tmp_path / name, (8, 12)).images
        np.testing.assert_array_equal(found[0].numpy().transpose(1, 2, 0), expected, err_msg=name)
    halved = read(tmp_path / "five", (4, 6)).images[0].numpy().transpose(1, 2, 0)
    averaged = five.reshape(4, 2, 6, 2, 5).mean((1, 3))
    np.testing.assert_allclose(halved, averaged, atol=0.6)


def test_pages_are_images(tmp_path: Path, rng: np.random.Generator) -> None:
    import tifffile

    pages = rng.integers(0, 256, (5, 8, 8), dtype=np.uint8)
    write_tiff(tmp_path / "a.tif", pages)
    Image.fromarray(pages[0]).save(
        tmp_path / "b.tif", compression="tiff_lzw", save_all=True, append_images=[Image.fromarray(pages[3])]
    )
    tifffile.imwrite(tmp_path / "c.tif", pages[None, :, None].repeat(2, 2), imagej=True)  # 5 images of 2 channels
    files = ImageFiles(tmp_path)
    assert files.names[:2] == ["a.tif#0", "a.tif#1"]
    assert [header.frames for header in files.headers] == [5, 2, 5]
    found = read_whole(files, [4, 6, 1], Reading((8, 8))).images
    assert np.array_equal(found[:, 0].numpy(), pages[[4, 3, 1]])
    two = read_whole(files, [8], Reading((8, 8))).images
    assert np.array_equal(two[0].numpy(), pages[[1, 1]])


def test_fewer_bits_are_stretched_to_bytes(tmp_path: Path, rng: np.random.Generator) -> None:
    import tifffile

    black = rng.integers(0, 2, (8, 8)).astype(bool)
    tifffile.imwrite(tmp_path / "a.tif", black, photometric="miniswhite")  # as a fax: 1 is black
    Image.fromarray(black).save(tmp_path / "b.tif", compression="group4")
    Image.fromarray(black).save(tmp_path / "c.png")
    np.save(tmp_path / "d.npy", black)
    listed = [str(tmp_path / name) for name in ("a.tif", "b.tif", "c.png")]
    found = read_items(ImageFiles(tmp_path, listed), range(3), Reading((8, 8)))
    assert found.images.dtype == torch.uint8
    for image, expected in zip(found.images[:, 0].numpy(), (~black, black, black), strict=True):
        assert np.array_equal(image, expected * 255)
    assert np.array_equal(read(tmp_path / "d.npy", (8, 8)).images[0, 0].numpy(), black * 255)
    write_dicom(tmp_path / "e.dcm", rng.integers(0, 64, (8, 8)).astype(np.uint8), BitsStored=6, HighBit=5)
    assert "0 is black and 63 white, as the files state" in read(tmp_path / "e.dcm", (8, 8)).notes[0]


def test_upright_and_over_a_background(tmp_path: Path, rng: np.random.Generator) -> None:
    colour = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    turned = Image.fromarray(colour)
    exif = turned.getexif()
    exif[274] = 6  # turn by 90 degrees clockwise to see it upright
    turned.save(tmp_path / "turned.png", exif=exif)
    alpha = np.dstack([colour, np.full((8, 8), 255, np.uint8)])
    alpha[:4, :, 3] = 0
    alpha[4, :, 3] = 51
    Image.fromarray(alpha).save(tmp_path / "z.png")
    found = read(tmp_path, (8, 8), background="#ff0000")
    assert np.array_equal(found.images[0].numpy().transpose(1, 2, 0), np.rot90(colour, -1))
    laid = found.images[1].numpy().transpose(1, 2, 0)
    assert (laid[:4] == (255, 0, 0)).all()
    np.testing.assert_allclose(laid[4], colour[4] * 0.2 + np.array([255, 0, 0]) * 0.8, atol=1)
    assert np.array_equal(laid[5:], colour[5:])
    assert found.notes == [f"{str(tmp_path)!r}: transparent parts of 1 of 2 images show #ff0000 (--background)"]
    with pytest.raises(ValueError, match="background is 'rainbow'; expected a colour"):
        Reading((8, 8), background="rainbow")


def test_rectangles_are_cut_to_their_proportions(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (12, 1))  # (12, 24), darker at the left
    write_png(tmp_path / "a.png", ramp)
    assert np.array_equal(read(tmp_path, (12, 16)).images[0, 0].numpy(), ramp[:, 4:20])
    assert np.array_equal(read(tmp_path, (6, 12)).images[0, 0].numpy()[0], ramp[0].reshape(12, 2).mean(1))
    assert read(tmp_path, (9, 7)).images.shape == (1, 1, 9, 7)


def test_arrays_and_tables(tmp_path: Path, rng: np.random.Generator) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(
        pa.table({"id": list(range(6)), "image": encoded, "label": [0, 1, 2, 0, 1, 2]}),
        tmp_path / "a.parquet",
        row_group_size=2,
    )
    np.savez_compressed(tmp_path / "a.npz", images=images.transpose(0, 3, 1, 2), labels=np.arange(6))
    np.save(tmp_path / "a.npy", images.astype(np.int64))
    for name, labels in (("a.parquet", [0, 1, 2, 0, 1, 2]), ("a.npz", list(range(6))), ("a.npy", None)):
        files = ImageFiles(tmp_path / name)
        found = read_whole(files, [5, 0, 3], Reading((8, 8))).images
        assert found.dtype == torch.uint8  # also whole numbers of other types that bytes hold
        assert np.array_equal(found.numpy().transpose(0, 2, 3, 1), images[[5, 0, 3]]), name
        assert (None if (given := files.labels()) is None else given.tolist()) == labels
    encoded[3]["bytes"] = b"no image"
    pq.write_table(pa.table({"image": encoded}), tmp_path / "a.parquet")
    some = read_items(ImageFiles(tmp_path / "a.parquet"), range(6), Reading((8, 8)))
    assert [line.split(" ")[0] for line in some.unreadable] == ["a.parquet#3"]
    assert np.array_equal(some.images.numpy().transpose(0, 2, 3, 1), images[[0, 1, 2, 4, 5]])


def test_dicom_is_rescaled_inverted_and_known_by_its_content(tmp_path: Path) -> None:
    stored = TWELVE[:, :32]
    write_dicom(tmp_path / "IM0001", stored, BitsStored=12, HighBit=11, RescaleSlope=1, RescaleIntercept=-1024, PatientID="p1")
    write_dicom(
        tmp_path / "1.2.840.7", stored, BitsStored=12, HighBit=11, RescaleSlope=1, RescaleIntercept=-1024, PatientID="p2",
        PhotometricInterpretation="MONOCHROME1",
    )  # fmt: skip
    files = ImageFiles(tmp_path)
    assert files.names == ["1.2.840.7", "IM0001"]
    assert files.groups("patient") == ["p2", "p1"]
    found = read_whole(files, [0, 1], Reading((64, 32)))
    np.testing.assert_array_equal(as_values(found.images, -1024, 3071).round()[1, 0], stored.astype(int) - 1024)
    np.testing.assert_array_equal(as_values(found.images, -1024, 3071).round()[0, 0], 4095 - stored.astype(int) - 1024)
    assert found.notes == [f"{str(tmp_path)!r}: -1024 is black and 3071 white, as the files state"]


def test_dicom_of_several_frames_and_of_colour(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "colour").mkdir()
    volume = rng.integers(-1000, 3000, (4, 8, 8), dtype=np.int16)
    write_dicom(tmp_path / "frames" / "a.dcm", volume)
    colour = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    write_dicom(tmp_path / "colour" / "a.dcm", colour)
    found = read(tmp_path / "frames", (8, 8))
    low, high = volume.min(), volume.max()
    np.testing.assert_array_equal(as_values(found.images, low, high).round()[:, 0], volume)
    assert np.array_equal(read(tmp_path / "colour", (8, 8)).images[0].numpy().transpose(1, 2, 0), colour)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_slices_stand_upright(suffix: str, tmp_path: Path, rng: np.random.Generator) -> None:
    import nibabel

    volume = rng.integers(-1000, 3000, (6, 7, 5)).astype(np.int16)  # right, front, up
    upright = volume.transpose(2, 1, 0)[:, ::-1]  # slices, of which the front is above
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / f"a{suffix}")
    turned = np.ascontiguousarray(volume.transpose(2, 0, 1)[:, ::-1])  # up, left, front
    affine = np.array([[0, -1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(turned, affine), tmp_path / f"b{suffix}")
    files = ImageFiles(tmp_path)
    assert files.groups("file") == [f"a{suffix}"] * 5 + [f"b{suffix}"] * 5
    found = read_whole(files, range(10), Reading((7, 6)))
    values = as_values(found.images, volume.min(), volume.max()).round()[:, 0]
    np.testing.assert_array_equal(values[:5], upright)
    np.testing.assert_array_equal(values[5:], upright)


def test_every_file_that_cannot_be_read_is_counted_and_ten_are_named(tmp_path: Path) -> None:
    write_png(tmp_path / "good.png", np.zeros((8, 8), np.uint8))
    for i in range(12):
        (tmp_path / f"{i:02}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"12 of 13 images cannot be read: 00.png .*; 09.png .* and 2 more$") as caught:
        load_folder(tmp_path, 8)
    assert "10.png" not in str(caught.value)
    write_tiff(tmp_path / "t.tif", np.full((8, 8), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"t.tif .some of its values are NaN"):
        read_items(ImageFiles(tmp_path, [str(tmp_path / "t.tif")]), [0], Reading((8, 8)))


def test_the_kind_of_file_there_is_most_of_is_taken(tmp_path: Path) -> None:
    for i in range(3):
        write_png(tmp_path / f"{i}.png", np.zeros((8, 8), np.uint8))
    np.save(tmp_path / "embeddings.npy", np.zeros((3, 100)))
    files = ImageFiles(tmp_path)
    assert files.names == ["0.png", "1.png", "2.png"]
    assert files.notes == [f"{str(tmp_path)!r}: its 3 images are taken, and 1 arrays left aside"]


def blank_png(side: int) -> bytes:
    """A PNG of black pixels, which is a thousandth of what it holds."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 3 * side)) for _ in range(side)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_bad_archives_get_one_line_and_no_memory(tmp_path: Path) -> None:
    good = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(good, "PNG")

    def archive(name: str, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w", method) as made:
            for inner, content in files.items():
                made.writestr(inner, content)
        return tmp_path / name

    whole = archive("whole.zip", {"a.png": good.getvalue(), "b.png": good.getvalue()}, zipfile.ZIP_STORED)
    assert load_folder(whole, 64).shape == (2, 1, 64, 64)
    (tmp_path / "cut.zip").write_bytes(whole.read_bytes()[:-30])
    damaged = bytearray(whole.read_bytes())
    damaged[damaged.index(b"IDAT") + 40] ^= 255
    (tmp_path / "crc.zip").write_bytes(damaged)
    bomb = blank_png(6000)  # 108 MB of it
    assert len(bomb) < 120_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path, message in (
        (tmp_path / "cut.zip", "not a whole zip archive"),
        (tmp_path / "crc.zip", "1 of 2 images cannot be read: a.png .damaged in the archive: Bad CRC-32"),
        (archive("empty.zip", {}), "holds no images"),
        (archive("bytes.zip", {"a.png": bytes(40 * 2**20)}), "its file 'a.png' is packed .* to 1, as no image is"),
        (archive("picture.zip", {"a.png": bomb}), r"a.png .packed .* to 1, 103 MiB, as no image is"),
        (archive("out.zip", {"../a.png": good.getvalue()}), "has a name that leads out of the archive"),
    ):
        if path.name == "bytes.zip":
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # it took memory to write
        with pytest.raises(ValueError, match=message) as caught:
            load_folder(path, 64)
        assert "\n" not in str(caught.value)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert taken < 50 * 2**20
