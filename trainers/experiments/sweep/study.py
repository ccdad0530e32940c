"""The study of a sweep: one MLflow run, a table and a figure, which show what is known so far."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.experiments.address import chart_address
from trainers.experiments.sweep.grid import varied_fields
from trainers.experiments.sweep.plan import Sweep
from trainers.experiments.sweep.results import Row, result_row, table_text, write_results
from trainers.launchers.job import FAILED, FINISHED, Ended

if TYPE_CHECKING:
    from mlflow_icr.tracking import Tracker

WAITING = "WAITING"


class Study:
    """The study's MLflow run and its files, which show what is known so far after every run."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.varied = sweep, varied_fields(sweep.runs)
        self.runs = {run.name: run for run in sweep.runs}
        self.rows: dict[str, Row] = {}
        for run in sweep.runs:
            self.set(Ended(run.name, FINISHED if run.name in sweep.finished else WAITING))
        self.tracker = self._open()

    def _open(self) -> Tracker:
        from mlflow_icr.tracking import MLflowSink, Tracker

        run_id = os.environ.get("MLFLOW_RUN_ID")
        tracker = Tracker(self.sweep.folder, [MLflowSink(run_name=self.sweep.name)], resume="allow")
        tracker.open(self.sweep.params, {"role": "study", "study_name": self.sweep.name})
        tracker.flush()  # which also makes the tables of a fresh local store: several runs at once would all try
        if run_id is not None and tracker.run_id not in (None, run_id):  # `mlflow run` makes a new run each time
            with tempfile.TemporaryDirectory() as folder:
                launched = Tracker(folder, [MLflowSink(run_id=run_id, joins=True)])
                launched.open({}, {"study_name": self.sweep.name})
                launched.note(f"Continues the study `{self.sweep.name}`, whose results are in run {tracker.run_id}.")
                launched.close(FINISHED)
        return tracker

    def set(self, ended: Ended) -> None:
        """Record the outcome of a run."""
        run = self.runs[ended.name]
        self.rows[run.name] = result_row(run, self.varied, self.sweep.folder_of(run), ended.status, ended.why)

    def of(self, status: str) -> list[Row]:
        """The runs with a status."""
        return [row for row in self.rows.values() if row["status"] == status.lower()]

    @property
    def failures(self) -> list[str]:
        """A line for each run that failed: its name, its first error, its log."""
        return [f"{row['run']} failed: {row['error']}; its log: {self.log(row['run'])}" for row in self.of(FAILED)]

    def log(self, name: str) -> Path:
        """Where a run's output went."""
        return self.sweep.job(self.runs[name]).log

    def publish(self) -> None:
        """Write table and figure of what is known, and show them in MLflow. A full disk costs a line, not the runs."""
        first = self.sweep.runs[0].config
        try:
            files = write_results(self.sweep.runs, self.rows, self.sweep.folder, f"{first.data}: {self.sweep.name}")
            counts = {f"runs_{status.lower()}": float(len(self.of(status))) for status in (FINISHED, FAILED, WAITING)}
            self.tracker.metrics(counts, len(self.of(FINISHED)))
            for path in files:
                self.tracker.artifact(path)
            failed = "".join(f"\n\n{line}" for line in self.failures)
            runs = f"Runs: `tags.study = '{self.sweep.name}'`"
            self.tracker.note(f"[All curves]({self.address})\n\n{runs}{failed}\n\n{self.text}")
        except OSError as error:
            print(f"sweep: table and figure are not written: {error}", file=sys.stderr)

    def close(self, status: str) -> None:
        """End the study's MLflow run, with its table; MLflow would keep one for each time that it is logged."""
        try:
            self.tracker.table("sweep", list(self.rows.values()), len(self.of(FINISHED)))
        finally:
            self.tracker.close(status)

    @property
    def text(self) -> str:
        """The table, as text."""
        return table_text(list(self.rows.values()), self.varied)

    @property
    def address(self) -> str:
        """The page with all curves."""
        import mlflow

        return chart_address(mlflow.get_tracking_uri(), self.tracker.experiment_id or "0", self.sweep.name)
