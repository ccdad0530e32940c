"""When a state is saved, which are kept, what is not saved, and what a resumption may have otherwise."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mlflow_icr.tracking import read_history
from mlflow_icr.tracking.checkpoints.folder import checkpoints
from mlflow_icr.tracking.event_log import ended_as
from tests import programs
from tests.family_runs import RecordedRun, configured, finished
from tests.training import SHORT
from trainers import checkpoint
from trainers.agreement import Agreement, DivergedError, TrainingError
from trainers.checkpoint import latest_checkpoint
from trainers.command_line import train_parser
from trainers.config import load_config
from trainers.console import Console
from trainers.launchers.job import STOP_SIGNALS
from trainers.run import Run
from trainers.train import Stop, configure, note_changes


def going(run: Run) -> str:
    return run.train_to_end(None, Console(run.config, shown=False), lambda: False)


def plain(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def test_a_kill_while_it_is_measured_costs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("ddpm")
    whole = finished(config, tmp_path / "whole")
    run, measure = RecordedRun(config, tmp_path / "killed"), Run.measure

    def killed(self: Run, judged: bool) -> Any:
        if self.state.images_seen:
            raise KeyboardInterrupt
        return measure(self, judged)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            going(run)
    assert list(checkpoints(tmp_path / "killed")) == [0, 160]
    again = RecordedRun(config, tmp_path / "killed", resume=True)
    assert again.state.images_seen == 160
    again.rows = run.rows
    assert going(again) == "FINISHED"
    assert plain(again.rows) == plain(whole.rows)


def test_checkpoints_between_measurements_come_by_the_clock_and_go_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    write = checkpoint.write_checkpoint
    monkeypatch.setattr(checkpoint, "write_checkpoint", lambda out, seen, w: saved.append(seen) or write(out, seen, w))
    finished(configured("ddpm", save_every_minutes=1e-9), tmp_path / "often")
    assert saved == list(range(0, 321, 32))
    assert list(checkpoints(tmp_path / "often")) == [0, 160, 288, 320]  # the measured, and one more in case of damage
    saved.clear()
    finished(configured("ddpm", save_every_minutes=0), tmp_path / "never")
    assert saved == [0, 160, 320]


def test_ranks_agree_on_a_save_and_the_clock_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    class TwoRanks:
        num_processes, device, other = 2, torch.device("cpu"), torch.zeros(3)

        def reduce(self, wishes: torch.Tensor, reduction: str) -> torch.Tensor:
            return wishes + self.other

    class State:
        skipped = torch.zeros(2, dtype=torch.int64)

    now = [0.0]
    monkeypatch.setattr("trainers.agreement.time.monotonic", lambda: now[0])
    ranks = TwoRanks()
    agreement: Any = Agreement(ranks, 1e-3, 15)  # type: ignore[arg-type]
    for at, asked, other, expected in (
        (60.0, 8, torch.zeros(3), (False, False)),
        (60.0, 8, torch.tensor([0.0, 1.0, 0.0]), (False, True)),
        (60.0, 8, torch.tensor([1.0, 0.0, 0.0]), (True, False)),
        (900.0, 9, torch.ones(3), (False, False)),  # asked together, every eighth step
        (900.0, 16, torch.zeros(3), (False, True)),
    ):
        now[0], ranks.other = at, other
        decision = agreement.ask(State(), False, asked)
        assert (decision.stop, decision.save) == expected
    agreement.saved()
    ranks.other = torch.zeros(3)
    assert not agreement.ask(State(), False, 24).save
    ranks.other = torch.tensor([0.0, 0.0, 40.0])
    with pytest.raises(DivergedError, match="the gradients of the last 20 steps were not finite"):
        agreement.ask(State(), False, 32)


def test_weights_that_are_not_finite_are_not_saved_and_end_the_run(tmp_path: Path) -> None:
    run = Run(configured("ddpm", learning_rate=0.5), tmp_path)
    run._save()
    run.state.images_seen = 32
    with torch.no_grad():
        next(iter(run.state.network.parameters())).flatten()[0] = torch.inf
    with pytest.raises(DivergedError, match=r"learning_rate is 0\.5: network/.* is not finite.*--learning-rate LOWER"):
        run._save()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / f"{0:012d}"
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_step_that_does_not_fit_the_memory_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(configured("ddpm"), tmp_path)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run.family, "loss", full)
    with pytest.raises(TrainingError, match=r"batch_size is 32, of which a part of 32 .*--gradient-accumulation-steps"):
        going(run)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_of_the_signals_is_a_wish_to_stop(number: signal.Signals) -> None:
    before = {one: signal.getsignal(one) for one in STOP_SIGNALS}
    try:
        signal.signal(number, signal.SIG_DFL)  # whatever has started the tests may ignore SIGHUP
        stop = Stop()
        os.kill(os.getpid(), number)
        assert stop.signal == number
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def test_a_closed_terminal_ends_a_run_after_a_checkpoint(tmp_path: Path) -> None:
    """What is printed then is an error of the terminal, which must not end the run first."""
    folder = tmp_path / "run"
    code = """
import os, pty, select, signal, sys, time
from pathlib import Path
folder, flags = Path(sys.argv[1]), sys.argv[2:]
pid, terminal = pty.fork()
if not pid:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    from trainers.train import main
    os._exit(main(flags))
measured = None
while measured is None or time.monotonic() < measured + 0.5:
    if select.select([terminal], [], [], 0.05)[0]:
        os.read(terminal, 65536)
    history = folder / "history.jsonl"
    if measured is None and history.exists() and history.read_bytes().count(b"\\n") == 2:
        measured = time.monotonic()
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    flags = [*SHORT, "--total-kimg=4000", f"--output-dir={folder}"]
    done = programs.run(["-c", code, str(folder), *flags], timeout=200)
    assert done.returncode == 128 + signal.SIGHUP, done.stderr
    assert ended_as(folder) == "KILLED"
    steps = [int(path.name) for path in (folder / "checkpoints").glob("[0-9]*")]
    assert max(steps) > max(row["images_seen"] for row in read_history(folder))  # saved where it was stopped


def test_resume_auto_begins_and_goes_on_by_the_same_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    line = ["--preset=digits", "--total-kimg=4", f"--output-dir={folder}", "--resume", "auto", "--learning-rate=1e-3"]
    config, *_, resume = configure(train_parser().parse_args(line))
    assert not resume
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config.grouped()))
    again, *_, resume = configure(train_parser().parse_args(line))
    assert resume
    assert again == config
    changed = ["--total-kimg=9", "--learning-rate=5e-4", "--num-samples=8", "--curve-every=7", "--checkpoints-total-limit=3"]
    other, *_, resume = configure(train_parser().parse_args([*line, *changed]))
    assert resume
    assert (other.optimizer.total_kimg, other.optimizer.learning_rate, other.monitor.num_samples) == (9, 5e-4, 8)
    tags = note_changes(folder, other, 96)
    assert tags["icr.changed.learning_rate"] == "0.001 -> 0.0005 at 96 images"
    (row,) = (json.loads(text) for text in (folder / "config_changes.jsonl").read_text().splitlines())
    assert row["changes"].keys() == {flag.split("=")[0][2:].replace("-", "_") for flag in changed}
    for flag, message in (
        ("--seed=7", "seed is 7, but the run to resume has 0; expected the same"),
        ("--sigma-data=0.6", r"sigma_data is 0\.6, but the run to resume has 0\.75"),
        ("--probe-images=9", "probe_images is 9, but"),
    ):
        with pytest.raises(ValueError, match=message):
            configure(train_parser().parse_args([*line, flag]))
    with pytest.raises(ValueError, match="resume is 'atuo'; did you mean auto"):
        configure(train_parser().parse_args([*line[:3], "--resume=atuo"]))
    with pytest.raises(ValueError, match="which holds a run; expected a new folder, or --resume"):
        configure(train_parser().parse_args(line[:3]))
    assert load_config("digits", {}).run.save_every_minutes == 15
