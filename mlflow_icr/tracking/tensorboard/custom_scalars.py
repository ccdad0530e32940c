"""TensorBoard's custom scalars page: its charts, and the overlay of copies on the axis of ICR."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlflow_icr.monitoring.evidence import RATIOS
from mlflow_icr.monitoring.series import Rows, series

ICR = "repr/icr_debiased"
COPIES = ("mem/ratio_l2", "mem/ratio_l2_low", "mem/ratio_l2_high")
OVERLAY = ("overlay/copies", "overlay/copies_low", "overlay/copies_high")
# "Margin" has series of three tags each: a value and its bounds. Tags of "Multiline" are patterns.
LAYOUT = {
    "ICR and copies": {
        "ICR, debiased, with its 95 % interval, and copies on its axis (lowest ICR: none; first ICR: all)": [
            "Margin", [ICR, "repr/icr_low", "repr/icr_high", *OVERLAY],
        ],
        "share of samples that are copies": ["Margin", [*COPIES]],
    },
    "learning by heart": {
        "error ratios: of far views, which the verdict reads, and of the views that show most": [
            "Margin", [f"{key}{end}" for key in RATIOS for end in ("", "_low", "_high")],
        ],
        "energies along Fisher directions": ["Multiline", ["^repr/fisher_residual_energy$", "^repr/fisher_invariant_energy$"]],
        "losses": ["Multiline", ["^loss/train_eval$", "^loss/heldout$"]],
    },
    "samples": {
        "kernel distances": ["Multiline", ["^gen/kid_[a-z0-9]+$", "^gen/kid_train_[a-z0-9]+$"]],
        "Frechet distances": ["Multiline", ["^gen/fd_[a-z0-9]+$", "^gen/fd_train_[a-z0-9]+$"]],
    },
}  # fmt: skip


def layout_summary() -> Any:
    """The layout as a summary; torch's writer knows only charts of one series, and the plugin's own needs TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    categories = []
    for title, charts in LAYOUT.items():
        made = []
        for name, (kind, tags) in charts.items():
            if kind == "Margin":
                of_three = [tags[i : i + 3] for i in range(0, len(tags), 3)]
                rows = [layout_pb2.MarginChartContent.Series(value=v, lower=low, upper=high) for v, low, high in of_three]
                made.append(layout_pb2.Chart(title=name, margin=layout_pb2.MarginChartContent(series=rows)))
            else:
                made.append(layout_pb2.Chart(title=name, multiline=layout_pb2.MultilineChartContent(tag=list(tags))))
        categories.append(layout_pb2.Category(title=title, chart=made))
    content = layout_pb2.Layout(category=categories).SerializeToString()
    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME))
    tensor = TensorProto(dtype="DT_STRING", string_val=[content], tensor_shape=TensorShapeProto())
    return Summary(value=[Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=plugin)])


def overlay(rows: Rows) -> dict[str, float]:
    """The copies of the last row, with their interval, on the axis of ICR: lowest + ratio (first - lowest).

    `first` is the first debiased ICR of the history, that of an untrained network, and `lowest` the lowest one up to the
    row's step: without copies the line follows the running minimum of ICR, and it leaves that by as much of the way back up
    as there are copies. Empty where there is no ratio, or no ICR yet.
    """
    row = rows[-1]
    past = [value for at, value in series(rows, ICR) if at <= row["images_seen"]]
    if COPIES[0] not in row or not past:
        return {}
    return _on_axis(row, past[0], min(past))


def _on_axis(row: Mapping[str, float], first: float, lowest: float) -> dict[str, float]:
    # All three or none: a chart leaves a series out whose bounds have other steps.
    ratios = [row.get(key, row[COPIES[0]]) for key in COPIES]
    values = {tag: lowest + ratio * (first - lowest) for tag, ratio in zip(OVERLAY, ratios, strict=True)}
    return values if all(map(math.isfinite, values.values())) else {}


class Overlay:
    """`overlay` for rows that come one by one, at a constant cost; `state` is its memory as plain data."""

    def __init__(self, state: Mapping[str, float] | None = None) -> None:
        self.state: dict[str, float] = dict(state or {})

    def add(self, row: Mapping[str, float]) -> dict[str, float] | None:
        """The overlay of the next row; None for one that comes late, after a row of more images seen."""
        at = row["images_seen"]
        if at < self.state.get("at", at):
            return None
        self.state["at"] = at
        if ICR in row and math.isfinite(row[ICR]):
            self.state.setdefault("first", row[ICR])
            self.state["lowest"] = min(row[ICR], self.state.get("lowest", row[ICR]))
        if COPIES[0] not in row or "first" not in self.state:
            return {}
        first, lowest = self.state["first"], self.state["lowest"]
        return _on_axis(row, first, lowest)
