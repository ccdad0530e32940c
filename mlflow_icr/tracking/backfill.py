"""Sinks of measurements that are made when the training is over: each at the time at which its weights were written.

A repeated measurement then gives the same points, not new ones: a store keeps a point of the same key, step, time and value
once. And charts over time show when the model was what was measured, not when somebody looked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlflow_icr.monitoring.report import Report
from mlflow_icr.tracking.mlflow.outbox import Outbox
from mlflow_icr.tracking.mlflow.sink import MLflowSink
from mlflow_icr.tracking.mlflow.store import answers, connect, get_run
from mlflow_icr.tracking.tensorboard.sink import TensorBoardSink

SECTIONS = ("repr", "perf/measure")  # beginnings of the keys that a measurement has


class BackfillMLflowSink(MLflowSink):
    """Adds measurements to a run as it is, finished or not; `times` are seconds by step.

    What the run has already, at a step, is not written again. Raises ValueError for a run that is not there, or that was
    measured by another protocol, OSError where the store does not answer.
    """

    def __init__(self, run_id: str, times: Mapping[int, float], protocol_digest: str) -> None:
        super().__init__(run_id=run_id, joins=True)
        self._times = times
        self._there = _measured_in(run_id, protocol_digest)

    def recorded(self) -> Mapping[int, set[str]]:
        """Keys by step of all that is in the outbox, or in the run."""
        box = super().recorded()
        return {step: set(box.get(step, ())) | self._there.get(step, set()) for step in {*box, *self._there}}

    def write(self, report: Report) -> None:
        """Log what the run does not have of a report: values, and pictures where it had no value of the step."""
        there = self._there.get(report.step, set())
        super().write(report.without({*there, *report.figures} if there else ()))

    def _moment(self, step: int) -> int:
        return round(self._times[step] * 1000) if step in self._times else super()._moment(step)


class BackfillTensorBoardSink(TensorBoardSink):
    """Event files of such measurements; `times` are seconds by step."""

    def __init__(self, log_dir: Path | str, times: Mapping[int, float]) -> None:
        super().__init__(log_dir)
        self._times = times

    def _moment(self, step: int) -> float | None:
        return self._times.get(step)


def _measured_in(run_id: str, protocol_digest: str) -> dict[int, set[str]]:
    """Keys of measurements by step that a run has."""
    client = connect()
    run = get_run(client, run_id)
    digest = run.data.params.get("protocol_digest", protocol_digest)
    if digest != protocol_digest:
        raise ValueError(
            f"run_id is {run_id!r}, a run that was measured by the protocol {digest}, and this is {protocol_digest}: values "
            "of two cannot be compared; expected another run, or none"
        )
    found: dict[int, set[str]] = {}
    with answers():
        for key in run.data.metrics:
            if key.startswith(SECTIONS):
                for point in client.get_metric_history(run_id, key):
                    found.setdefault(point.step, set()).add(key)
    return found


def add_to_run(sink: MLflowSink, report: Report, params: Mapping[str, object]) -> None:
    """Log one report to the run that a sink joins, and wait until the store has it.

    Raises ValueError for a run that does not take it, OSError where the store does not answer.
    """
    sink.open(params, {})
    sink.write(report)
    if not sink.finish():
        with answers():
            raise sink.failure or OSError(f"the run {sink.run_id} does not take the results")


def is_delivered(folder: Path, run_id: str, rows: list[dict[str, float]]) -> bool:
    """Whether a run has all rows of a folder's journal, as far as the folder's outbox knows.

    Raises ValueError for a folder whose results go to another run.
    """
    box = Outbox(folder)
    try:
        if box.run_id not in (None, run_id):
            raise ValueError(f"run_id is {run_id!r}, and the results in {str(folder)!r} go to {box.run_id}; expected that one")
        if box.run_id is None or box.waiting or box.refused:
            return False
        return all(row.keys() - {"images_seen"} <= set(box.recorded.get(int(row["images_seen"]), ())) for row in rows)
    finally:
        box.close()
