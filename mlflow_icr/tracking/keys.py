"""Keys and values that trackers accept: MLflow's limits, and the replacement of keys that are not allowed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from numbers import Real
from typing import Any

import numpy as np

# MLflow's limits: metrics of one call, parameters or tags of one call, and characters of keys and values.
METRICS_PER_CALL, TEXTS_PER_CALL = 1000, 100
LONGEST_KEY, LONGEST_PARAM, LONGEST_TAG = 250, 6000, 8000
NUMBERS = (Real, np.bool_)
LONGEST_LIST = 64  # longer lists and vectors do not become separate values
# Characters that are not allowed: in any key of MLflow's; in one that is a file's name too, or a picture's in MLflow.
NOT_MLFLOW = re.compile(r"[^\w.\-/ :]")
NOT_FILE = re.compile(r"[^A-Za-z0-9_./-]")


def clean_key(key: object, wrong: re.Pattern[str] = NOT_FILE) -> str:
    """A key for any text: allowed characters, no empty or dotted parts, at most 250 long; an allowed text is its own key."""
    parts = wrong.sub("_", str(key)).split("/")
    return "/".join(part if part.strip(".") else "_" * len(part) for part in parts if part)[:LONGEST_KEY].rstrip("/") or "_"


def file_key(key: object) -> str:
    """A clean key that no other text has."""
    clean = clean_key(key)
    return clean if clean == str(key) else f"{clean[:200]}-{hashlib.sha256(str(key).encode()).hexdigest()[:8]}"


def plain_values(values: Mapping[Any, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Numbers and texts by key, from logged values: numbers, 0-d tensors and arrays on any device, text, nested dicts.

    A dict's keys are joined with `/`; short lists and vectors have their places as keys. Anything else becomes text.
    """
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for key, value in _leaves(values):
        try:
            if isinstance(value, NUMBERS):
                numbers[key] = float(value)
                continue
        except OverflowError:  # an integer of more than 308 digits
            pass
        texts[key] = str(value)
    return numbers, texts


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if hasattr(value, "detach"):  # a tensor, perhaps in bfloat16, which numpy does not have
            with suppress(TypeError, RuntimeError):  # a sparse one, or one of the device "meta", has no array
                value = value.detach().cpu()
                value = (value.float() if value.is_floating_point() else value).numpy()
        if isinstance(value, np.ndarray) and value.size == 1:
            value = value.reshape(()).item()
        if isinstance(value, np.ndarray) and value.ndim == 1:
            value = value.tolist()
        if isinstance(value, (list, tuple)) and 0 < len(value) <= LONGEST_LIST and all(_number(v) for v in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}/")
        else:
            yield name, value


def _number(value: object) -> bool:
    return isinstance(value, NUMBERS) or (hasattr(value, "detach") and getattr(value, "ndim", 1) == 0)
