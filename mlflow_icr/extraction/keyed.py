"""Random numbers that belong to a key, not to a moment: the same key gives the same numbers on any rank, in any batch."""

from __future__ import annotations

import hashlib

import numpy as np


def keyed_generator(purpose: str, *key: int) -> np.random.Generator:
    """A generator whose stream is fixed by what it is for and by integers such as (seed, image, view).

    Philox is counter-based: a 128-bit key selects one of 2^128 independent streams (Salmon et al. 2011), and making one
    costs microseconds. The key is hashed, so that neighbouring seeds and images share nothing.
    """
    digest = hashlib.blake2b(repr((purpose, *map(int, key))).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))
