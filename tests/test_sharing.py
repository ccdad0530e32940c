"""Images are read once on each machine: ranks map the same file, errors are everybody's, and nothing is left over."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import distributed as dist
from torch import multiprocessing

from mlflow_icr.extraction.images.store import Store, mapped, new_file
from trainers.data import load_data

RANKS = 2


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["MLFLOW_ICR_CACHE"] = f"{folder}/cache"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    read: list[str] = []
    import trainers.data as module

    whole = module.read_whole

    def counted(*given: object) -> object:
        read.append("once")
        return whole(*given)  # type: ignore[arg-type]

    module.read_whole = counted  # type: ignore[assignment]
    data = load_data(f"{folder}/data", resolution=8, num_images=6, num_heldout=2, seed=0)
    try:
        load_data(f"{folder}/bad", resolution=8, num_images=2, num_heldout=0, seed=0)
        error = ""
    except ValueError as caught:
        error = str(caught)
    left = [path.name for path in Path(f"{folder}/cache").iterdir()]
    torch.save(
        {"train": data.train.clone(), "notes": list(data.notes), "read": len(read), "error": error, "left": left},
        f"{folder}/{rank}.pt",
    )
    dist.barrier()  # the memory is shared
    data.train[0] = rank + 1
    dist.barrier()
    torch.save(data.train[0].clone(), f"{folder}/seen{rank}.pt")
    dist.destroy_process_group()


def test_ranks_share_one_reading(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "data").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "data" / f"{i}.png")
    (tmp_path / "bad").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "bad" / name).write_bytes(b"no image")
    alone = load_data(str(tmp_path / "data"), resolution=8, num_images=6, num_heldout=2, seed=0)
    multiprocessing.spawn(_work, args=(str(tmp_path),), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS))
    for found in (first, second):
        assert torch.equal(found["train"], alone.train)
        assert found["notes"] == list(alone.notes)
        assert "holds no images that can be read" in found["error"]
        assert found["left"] == []
    assert (first["read"], second["read"]) == (2, 0)
    seen = [torch.load(tmp_path / f"seen{rank}.pt", weights_only=True) for rank in range(RANKS)]
    assert torch.equal(*seen)  # one wrote what the other reads


def test_a_large_set_lies_in_a_file_without_a_name(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("mlflow_icr.extraction.images.store.MAPPED_BYTES", 1000)
    store = Store(tmp_path)
    small, large = store.new((10, 10), np.dtype(np.uint8)), store.new((10, 200), np.dtype(np.uint16))
    assert not isinstance(small, np.memmap)
    assert isinstance(large, np.memmap)
    assert list(tmp_path.iterdir()) == []
    large[:] = 7
    assert int(large.sum()) == 14_000
    path = new_file(tmp_path, 4000)
    mapped(path, (10, 200), np.dtype(np.uint16))[3] = 5
    assert int(mapped(path, (10, 200), np.dtype(np.uint16)).sum()) == 1000
