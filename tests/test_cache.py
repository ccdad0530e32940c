"""Reference embeddings are made once, and made anew when anything that matters changes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mlflow_icr.extraction.cache import ReferenceCache
from mlflow_icr.extraction.encoders import Encoder, load_encoder
from mlflow_icr.extraction.files import CACHE_VARIABLE, cache_folder
from mlflow_icr.generation import Reference, authenticity, frechet_distance


class Counting:
    """Random projections of images, and of how many there were any."""

    def __init__(self, weights: str = "1") -> None:
        self.seen = 0
        matrix = torch.randn(64, 5, generator=torch.Generator().manual_seed(int(weights)))

        def network(x: Tensor) -> Tensor:
            self.seen += len(x)
            return x.flatten(1) @ matrix

        self.encoder = Encoder("net", network, lambda x: x, dim=5, preprocessing="none", weights_sha256=weights)


def test_a_second_run_reads_what_the_first_one_made(digits: Tensor, tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    made = ReferenceCache(tmp_path).reference(first.encoder, digits)
    read = ReferenceCache(tmp_path).reference(second.encoder, digits)
    assert (first.seen, second.seen) == (64, 0)
    assert torch.equal(made.embeddings, read.embeddings)
    assert torch.equal(made.own_distances, read.own_distances)
    fake = torch.randn(40, 5)
    assert frechet_distance(fake, read.gaussian) == pytest.approx(frechet_distance(fake, made.embeddings), rel=1e-9)
    given = authenticity(read.embeddings, fake, own_distances=read.own_distances)
    assert torch.equal(given.scores, authenticity(made.embeddings, fake).scores)


def test_whatever_changes_an_embedding_makes_another_file(digits: Tensor, tmp_path: Path) -> None:
    cache, encoder = ReferenceCache(tmp_path), Counting().encoder
    changed = digits.clone()
    changed[63, 0, 7, 7] += 1
    other_text = Encoder("net", lambda x: x, lambda x: x, dim=5, preprocessing="another", weights_sha256="1")
    paths = [
        cache.path(encoder, digits),
        cache.path(encoder, changed),
        cache.path(encoder, digits[:63]),
        cache.path(encoder, digits.flip(0)),
        cache.path(encoder, digits.float() / 255),
        cache.path(Counting("2").encoder, digits),
        cache.path(other_text, digits),
    ]
    assert len(set(paths)) == len(paths)
    assert cache.path(encoder, digits.clone()) == paths[0]


def test_damaged_files_are_made_anew(digits: Tensor, tmp_path: Path) -> None:
    cache, counting = ReferenceCache(tmp_path), Counting()
    made = cache.reference(counting.encoder, digits)
    path = cache.path(counting.encoder, digits)
    assert path is not None
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\x80\x04K*."):  # cut, empty, a pickle
        path.write_bytes(damaged)
        assert cache.find(counting.encoder, digits) is None
        assert torch.equal(cache.reference(counting.encoder, digits).embeddings, made.embeddings)
        assert path.read_bytes() == whole
    assert list(tmp_path.rglob("*.part")) == []


def test_a_cache_that_cannot_be_written_costs_a_warning(
    digits: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        found = ReferenceCache(tmp_path / "file" / "below").reference(Counting().encoder, digits)
    assert found.embeddings.shape == (64, 5)
    assert "embeddings are not kept in" in caplog.text
    assert CACHE_VARIABLE in caplog.text


def test_pixels_and_lone_images_are_not_kept(digits: Tensor, tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path)
    cache.reference(load_encoder("pixels", shape=(1, 8, 8)), digits)
    assert len(cache.reference(Counting().encoder, digits[:1])) == 1
    assert list(tmp_path.rglob("*")) == []


def test_the_folder_is_the_users_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv(CACHE_VARIABLE, "off")
    assert cache_folder() is None
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/mlflow-icr")


def test_statistics_stand_for_their_embeddings() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, m, d in ((200, 300, 20), (15, 300, 20), (300, 15, 20), (10, 12, 20)):
        x, y = torch.randn(n, d, generator=generator), 2 * torch.randn(m, d, generator=generator) + 1
        expected = frechet_distance(x, y)
        a, b = Reference(x).gaussian, Reference(y).gaussian
        assert a.root.shape == (min(n, d), d)
        for left, right in ((a, b), (x, b), (a, y)):
            assert frechet_distance(left, right) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="y has 20 dimensions where the other set has 3; expected the same"):
        frechet_distance(torch.randn(5, 3), b)
