"""A sweep: the same training for several sizes, seeds or any other values, and from where on each turns and copies."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlflow_icr.extraction.files import write_whole
from mlflow_icr.tracking.event_log import ended_as
from mlflow_icr.tracking.folder import holds_run
from mlflow_icr.tracking.mlflow.sync import deliver_folder
from trainers.experiments.address import without_secrets
from trainers.experiments.sweep.grid import text_of, varied_fields
from trainers.experiments.sweep.plan import LOCK, STUDY, Sweep, plan
from trainers.experiments.sweep.study import Study
from trainers.launchers.job import FAILED, FINISHED, KILLED, RUNNING, Ended, Launcher
from trainers.launchers.local import LocalLauncher
from trainers.launchers.slurm import SlurmLauncher
from trainers.train import Stop


def _echo(text: str) -> None:
    print(text, flush=True)


def announce(sweep: Sweep) -> None:
    """Print how many runs there are, in what they differ, and the state of each."""
    varied = varied_fields(sweep.runs)
    values = {field: dict.fromkeys(text_of(run.place[field]) for run in sweep.runs) for field in varied}
    grid = " x ".join(f"{field} {', '.join(texts)}" for field, texts in values.items())
    where = f"{sweep.parallel} at a time, {'on this machine' if sweep.launcher == 'local' else 'by Slurm'}"
    count = len(sweep.runs)
    _echo(f"{count} {'run' if count == 1 else 'runs'}{f': {grid}' if grid else ''}; {where}; in {sweep.folder}")
    width = max(len(run.name) for run in sweep.runs)
    for run in sweep.runs:
        c = run.config
        description = (
            f"{c.data.source}, {c.data.num_images} images, seed {c.run.seed}, {c.optimizer.total_kimg:g} thousand images seen"
        )
        _echo(f"  {run.name:{width}}  {sweep.states[run.name]}  ({description})")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Keep other sweeps out of a folder. Children inherit the lock: one that outlives us keeps it. Raises ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"output_dir is {str(folder)!r}, where a sweep, or a run that one left behind, is at work"
            ) from None
        yield lock
    finally:
        os.close(lock)


def _launcher(sweep: Sweep, lock: int) -> Launcher:
    if sweep.launcher == "local":
        return LocalLauncher(sweep.parallel, inherited=(lock,))
    folders = {run.name: sweep.folder_of(run) for run in sweep.runs}
    return SlurmLauncher(
        sweep.folder / "slurm",
        sweep.slurm,
        lambda name: ended_as(folders[name]) == FINISHED,
        name=sweep.folder.name,
        parallel=sweep.parallel,
    )


def _print_outcome(study: Study, ended: Ended) -> None:
    row, run = study.rows[ended.name], ended.name
    progress = f"[{len(study.of(FINISHED))}/{len(study.rows)}]"
    if ended.status == FAILED:
        _echo(f"{progress} {run} failed: {ended.why}; its log: {study.log(run)}")
    elif ended.status == FINISHED:
        turned = "" if row["turned_at_images_seen"] is None else f", turned at {row['turned_at_images_seen']:,.0f} images seen"
        onset = row["mem_onset_images_seen"]
        _echo(f"{progress} {run} finished: {row['verdict']}{turned}{'' if onset is None else f', copies from {onset:,.0f} on'}")
    else:
        _echo(
            f"{progress} {run} {'goes on by itself' if ended.status == RUNNING else 'stopped'}{ended.why and ': '}{ended.why}"
        )


def _deliver(sweep: Sweep, names: Sequence[str]) -> None:
    """Deliver to MLflow what ended runs could not deliver themselves, as when many wrote to one SQLite file at once."""
    for run in sweep.runs:
        if run.name in names and holds_run(sweep.folder_of(run)):
            with contextlib.suppress(ValueError):  # another process writes there, or its log is damaged: it says so itself
                if not deliver_folder(sweep.folder_of(run)).complete:
                    print(f"MLflow has not taken everything; mlflow-icr sync {sweep.folder} delivers the rest", file=sys.stderr)
                    return


def run_sweep(sweep: Sweep, launcher: Launcher, wants_stop: Callable[[], bool]) -> str:
    """Run what is not finished, show results as they come, and conclude; returns FINISHED, FAILED or KILLED."""
    write_whole(sweep.folder / STUDY, lambda file: file.write(json.dumps({"study": sweep.name}).encode()))
    study, status = Study(sweep), FAILED
    jobs = [sweep.job(run) for run in sweep.runs if run.name not in sweep.finished]
    ended_names = []
    try:
        study.publish()
        with contextlib.closing(launcher.run(jobs, wants_stop, _echo)) as ends:
            for ended in ends if jobs else ():
                study.set(ended)
                ended_names += [ended.name] if ended.status != RUNNING else []
                _print_outcome(study, ended)
                study.publish()
        _deliver(sweep, [*sweep.finished, *ended_names])
        status = KILLED if wants_stop() else FAILED if study.of(FAILED) else FINISHED
        if status == FINISHED and len(study.of(FINISHED)) < len(study.rows):
            status = KILLED
    except KeyboardInterrupt:
        status = KILLED
        raise
    finally:  # a study that is not ended would stay RUNNING
        study.close(status)
    _conclude(study, status)
    return status


def _conclude(study: Study, status: str) -> None:
    import mlflow

    uri, folder = mlflow.get_tracking_uri(), study.sweep.folder
    print(f"\n{study.text}\n\nfigure       {folder / 'sweep.png'}\nMLflow       {study.address}")
    if not uri.startswith(("http://", "https://")):
        print(f"             (after: make ui, or mlflow ui --backend-store-uri {without_secrets(uri)})")
    print(f"TensorBoard  tensorboard --logdir {folder / 'runs'}", flush=True)
    for line in study.failures:
        print(line, file=sys.stderr)
    if status != FINISHED:
        num_finished, count = len(study.of(FINISHED)), len(study.rows)
        print(
            f"{status}: {num_finished} of {count} runs are finished; the same command continues with the others",
            file=sys.stderr,
        )


def _warn_of_local_store() -> None:
    import mlflow

    uri = mlflow.get_tracking_uri()
    if not uri.startswith(("http://", "https://", "databricks", "postgresql", "mysql", "mssql")):
        print(
            f"MLFLOW_TRACKING_URI is {without_secrets(uri)!r}, which jobs on several machines would all write; better a server",
            file=sys.stderr,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 when a run failed, 2 for bad input, 128 + signal when stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    with contextlib.ExitStack() as stack:
        try:
            sweep = plan(argv)
            announce(sweep)
            if sweep.dry_run:
                return 0
            lock = stack.enter_context(_locked(sweep.folder))
        except (ValueError, OSError) as error:
            print(f"sweep: error: {error}", file=sys.stderr)
            return 2
        if sweep.launcher == "slurm":
            _warn_of_local_store()
        stop = Stop()
        try:
            status = run_sweep(sweep, _launcher(sweep, lock), lambda: stop.signal is not None)
        except OSError as error:  # a full disk, a queue that takes nothing
            print(f"sweep: error: {error}; the same command goes on when that is mended", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
    if status == FINISHED:
        return 0
    return 128 + stop.signal if stop.signal else 1
