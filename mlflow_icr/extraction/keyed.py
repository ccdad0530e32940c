"""Keyed random numbers: the same key gives the same numbers on any rank, in any batch, in any order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def _philox(purpose: str, *key: int) -> np.random.Philox:
    digest = hashlib.blake2b(repr((purpose, *map(int, key))).encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))


def keyed_generator(purpose: str, *key: int) -> np.random.Generator:
    """A generator whose stream is fixed by its purpose and by integers such as (seed, image, view).

    Philox is counter-based: a 128-bit key selects one of 2^128 independent streams (Salmon et al. 2011), and making one
    costs microseconds. The key is hashed, so that neighbouring seeds and images share nothing.
    """
    return np.random.Generator(_philox(purpose, *key))


def keyed_rows(purpose: str, *key: int, rows: Sequence[int] | np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Unit noise (len(rows), *shape) float32 of some rows of a batch: row i does not depend on which other rows are drawn.

    All rows share a stream's key, and row i takes the 2^128 numbers whose counter has i in its third word. Setting a
    generator's counter costs a tenth of making a generator.
    """
    stream = _philox(purpose, *key)
    generator, start = np.random.Generator(stream), stream.state
    noise = np.empty((len(rows), *shape), dtype=np.float32)
    for place, row in enumerate(rows):
        start["state"]["counter"][2] = row
        stream.state = start
        generator.standard_normal(dtype=np.float32, out=noise[place])
    return noise
