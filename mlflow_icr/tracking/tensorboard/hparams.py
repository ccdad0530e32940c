"""A run's description in TensorBoard: its parameters and tags as one row of the hparams page, and as text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

# Tags and parameters may share names; the hparams page has one column for each name.
TAG_PREFIX = "tag/"
# Tags about a run's origin are in the text only.
SYSTEM = ("mlflow.", "tensorboard.")
# How this package's own import remembers names that MLflow does not allow.
RENAMED = "tensorboard.tag."
# Plain numbers only: 007 and 1_000 stay what they are.
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
STATUSES = {"FINISHED": "STATUS_SUCCESS", "FAILED": "STATUS_FAILURE", "KILLED": "STATUS_FAILURE"}


def parameter_value(text: str) -> bool | float | str:
    """A parameter's text as a value that the hparams page can sort: a number or a truth value if nothing is lost."""
    if text in ("True", "False"):
        return text == "True"
    if NUMBER.fullmatch(text):
        number = float(text)
        # An integer that a double cannot hold is an identifier, not an amount.
        if math.isfinite(number) and ("." in text or "e" in text.lower() or int(number) == int(text)):
            return number
    return text


def parameter_text(value: bool | float | str) -> str:
    """The inverse of `parameter_value`: a value as text; 3.0 is 3."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def plugin_value(summary: Any, tag: str, **data: Any) -> None:
    """Add data of the hparams plugin to a summary."""
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    value = summary.value.add(tag=tag, metadata=metadata.create_summary_metadata(HParamsPluginData(**data)))
    value.tensor.CopyFrom(metadata.NULL_TENSOR)


def text_value(summary: Any, tag: str, text: str) -> None:
    """Add a text, Markdown, to a summary."""
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING
    from tensorboard.plugins.text import metadata

    value = summary.value.add(tag=tag, metadata=metadata.create_summary_metadata("", ""))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    value.tensor.CopyFrom(TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape))


def set_parameters(start: Any, values: Mapping[str, bool | float | str]) -> None:
    """Put parameters into a SessionStartInfo, in the order of their names."""
    for key, value in sorted(values.items()):
        if isinstance(value, bool):
            start.hparams[key].bool_value = value
        elif isinstance(value, (int, float)):
            start.hparams[key].number_value = value
        else:
            start.hparams[key].string_value = value


def session_start(params: Mapping[str, Any], seconds: float) -> Any:
    """The summary of a run's parameters; without a list of metrics, as in `description`."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import SessionStartInfo

    start = SessionStartInfo(start_time_secs=seconds)
    set_parameters(start, {key: v if isinstance(v, (bool, int, float)) else str(v) for key, v in params.items()})
    summary = Summary()
    plugin_value(summary, metadata.SESSION_START_INFO_TAG, session_start_info=start)
    return summary


def description(info: Any, params: Mapping[str, str], tags: Mapping[str, str], group: str) -> bytes:
    """The event of a run's description, serialized: the same for the same run, so that a change is noticed.

    `info` is MLflow's RunInfo. There is no list of metrics in it: TensorBoard would take one run's list for all runs,
    and makes the list from the scalars itself where there is none.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import SessionEndInfo, SessionStartInfo

    started = (info.start_time or 0) / 1000
    # Runs with the same group name share a row: each has its own.
    start = SessionStartInfo(group_name=group, start_time_secs=started)
    own = {key: value for key, value in tags.items() if not key.startswith(SYSTEM)}
    hparams = {key: parameter_value(text) for key, text in params.items()}
    set_parameters(start, {**hparams, **{TAG_PREFIX + key: text for key, text in own.items()}})
    event = Event(wall_time=started, step=0)
    plugin_value(event.summary, metadata.SESSION_START_INFO_TAG, session_start_info=start)
    if info.status in STATUSES:
        status = api_pb2.Status.Value(STATUSES[info.status])
        end = SessionEndInfo(status=status, end_time_secs=(info.end_time or 0) / 1000)
        plugin_value(event.summary, metadata.SESSION_END_INFO_TAG, session_end_info=end)
    lines = [f"**run_id**: {info.run_id}", f"**status**: {info.status}"]
    lines += [f"**{key}**: {value}" for key, value in sorted(tags.items()) if not key.startswith(RENAMED)]
    text_value(event.summary, "run", "\n\n".join(lines))
    # Maps are written in any order otherwise.
    return bytes(event.SerializeToString(deterministic=True))
