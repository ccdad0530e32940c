"""The gate of a release: what passes, what does not, and why."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
from scipy.stats import binomtest

from mlflow_icr import Report
from mlflow_icr.cli import main
from mlflow_icr.reporting import write_report
from mlflow_icr.tracking import MLflowSink, Tracker
from tests.test_verdict import Rows, history


def copies(count: int, total: int, key: str = "mem/ratio_l2") -> dict[str, float]:
    """A detector's share with its exact interval, by scipy."""
    exact = binomtest(count, total).proportion_ci(0.95, method="exact")
    return {key: count / total, f"{key}_low": exact.low, f"{key}_high": exact.high}


def folder_of(rows: Rows, folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


CLEAN = history(0.2, 0.2)
TURNED = history(0.2, 1.2)


@pytest.mark.parametrize(
    ("rows", "flags", "status", "said"),
    [
        (CLEAN, ["--forbid=memorizing"], 0, "passes: the verdict is generalizing ("),
        (TURNED, ["--forbid=memorizing"], 0, "passes: the verdict is turning ("),
        (TURNED, ["--forbid=memorizing", "--forbid=turning"], 1, "fails: the verdict is turning ("),
        (CLEAN[:2], ["--forbid=memorizing"], 1, "fails: the verdict is undecided ("),
        (CLEAN, ["--max-copies=0.01"], 1, "fails: copies were not measured (no samples were drawn)"),
        (
            [*CLEAN[:-1], CLEAN[-1] | copies(0, 512)], ["--max-copies=0.01", "--forbid=memorizing"], 0,
            "passes: mem/ratio_l2 is 0 % of samples, with an interval up to 0.718 %, and at most 1 % is allowed; the verdict",
        ),
        (
            [*CLEAN[:-1], CLEAN[-1] | copies(0, 100)], ["--max-copies=0.01"], 1,
            "fails: mem/ratio_l2 is 0 % of samples, with an interval up to 3.62 %, and at most 1 % is allowed: "
            "368 samples without a copy would be enough",
        ),
        (
            [*CLEAN[:-1], CLEAN[-1] | copies(0, 512) | copies(40, 512, "mem/copies_sscd")], ["--max-copies=0.01"], 1,
            "fails: mem/copies_sscd is 7.81 % of samples, with an interval up to 10.5 %, and at most 1 % is allowed\n",
        ),
        (
            [*CLEAN[:-2], CLEAN[-2] | copies(0, 512), CLEAN[-1]], ["--max-copies=0.01"], 1,
            "fails: copies (mem/ratio_l2) were last measured at 71,054 images seen, and the run has reached 88,818",
        ),
    ],
)  # fmt: skip
def test_a_folder_passes_or_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Rows, flags: list[str], status: int, said: str
) -> None:
    assert main(["gate", str(folder_of(rows, tmp_path / "run")), *flags]) == status
    out = capsys.readouterr().out
    assert out.startswith(said)
    assert out.count("\n") == 1


def test_so_many_samples_without_a_copy_do_and_one_less_does_not(tmp_path: Path) -> None:
    for total, status in ((368, 0), (367, 1)):
        rows = [*CLEAN[:-1], CLEAN[-1] | copies(0, total)]
        assert main(["gate", str(folder_of(rows, tmp_path / str(total))), "--max-copies=0.01"]) == status


def test_a_run_of_mlflow_and_its_report_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(tmp_path / "run", [MLflowSink()])
    tracker.open({}, {})
    last = CLEAN[-1] | copies(0, 512)
    for row in [*CLEAN[:-1], last]:
        absent = {"mem/carlini": "needs 50 training images"} if row is last else {}
        tracker.record(Report(int(row["images_seen"]), {k: v for k, v in row.items() if k != "images_seen"}, absent=absent))
    tracker.close("FINISHED")
    said = []
    for name in (str(tmp_path / "run"), str(tracker.run_id), f"runs:/{tracker.run_id}"):
        assert main(["gate", name, "--max-copies", "0.01", "--forbid", "memorizing"]) == 0
        said.append(capsys.readouterr().out.strip())
    assert len(set(said)) == 1
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert said[0] in html.unescape(page)


def test_what_cannot_be_asked_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(folder_of(CLEAN, tmp_path / "run"))
    for arguments, message in (
        ([folder], "max_copies and forbid are not given; expected one of them at least"),
        ([folder, "--max-copies=1.5"], "max_copies is 1.5; expected a share above 0 and at most 1"),
        ([folder, "--forbid=copying"], "forbid is 'copying'; expected some of generalizing, turning, memorizing"),
        ([str(tmp_path), "--forbid=memorizing"], "history.jsonl"),
        (["0" * 32, "--forbid=memorizing"], "run_id is '00000000000000000000000000000000', which the tracking store does not"),
    ):
        assert main(["gate", *arguments]) == 2
        assert message in capsys.readouterr().err
