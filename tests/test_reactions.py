"""What is told of the verdict: functions, commands and webhooks, once for each change, and none of them disturbs anything."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlflow_icr import Report
from mlflow_icr.tracking import Tracker, VerdictChange
from tests.test_verdict import history, samples
from tests.test_verdict import states as states_of

ROWS = history(0.2, 1.2)
ROWS[-1] |= samples(ratio=0.5, authentic=10.0)
PLACES = [int(row["images_seen"]) for row in ROWS]


def changes() -> list[tuple[str, str, int]]:
    """Where a history's state is another one: state, the one before, images seen; by the verdict itself."""
    found = states_of(ROWS)
    before = ["undecided", *found]
    return [(state, was, at) for state, was, at in zip(found, before, PLACES, strict=False) if state != was]


def record(tracker: Tracker, first: int = 0, last: int | None = None) -> None:
    for row in ROWS[first:last]:
        tracker.record(Report(int(row["images_seen"]), {key: value for key, value in row.items() if key != "images_seen"}))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow_icr.tracking.worker.PAUSES", (0.01,))


def test_a_function_is_called_once_for_each_change_whatever_is_killed(tmp_path: Path) -> None:
    told: list[VerdictChange] = []
    threads: set[str] = set()

    def listen(change: VerdictChange) -> None:
        told.append(change)
        threads.add(threading.current_thread().name)

    half = len(ROWS) // 2
    tracker = Tracker(tmp_path, [], on_verdict=listen)
    record(tracker, 0, half)
    assert tracker.flush()
    tracker.abandon()  # as a kill does
    tracker = Tracker(tmp_path, [], resume="must", on_verdict=listen)
    record(tracker, half)
    tracker.close("FINISHED")
    assert [(one.state, one.previous, one.images_seen) for one in told] == changes()
    assert [one.state for one in told] == ["generalizing", "turning", "memorizing"]
    assert threads == {"on_verdict"}
    turned = told[1]
    assert turned.turned_at_images_seen in PLACES
    assert turned.checkpoint_images_seen in PLACES
    assert (turned.output_dir, turned.run_id) == (str(tmp_path), None)
    assert "turning" in turned.text

    late: list[VerdictChange] = []  # somebody who comes when all that has happened is told nothing of it
    (tmp_path / "on_verdict.json").unlink()
    tracker = Tracker(tmp_path, [], resume="must", on_verdict=late.append)
    tracker.close("FINISHED")
    assert late == []


def test_a_function_that_raises_or_hangs_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mlflow_icr.tracking.reactions.SECONDS", 0.2)
    ways = iter([lambda: 1 / 0, lambda: time.sleep(60), lambda: exit(3)])

    def listen(change: VerdictChange) -> None:
        next(ways)()

    tracker = Tracker(tmp_path, [], on_verdict=listen)
    started = time.monotonic()
    record(tracker)
    assert tracker.flush()
    assert time.monotonic() - started < 30
    tracker.close("FINISHED")
    places = {state: f"{at:,}" for state, _, at in changes()}
    assert [r.getMessage() for r in caplog.records if r.name.startswith("mlflow_icr")] == [
        f"on_verdict, told of generalizing at {places['generalizing']} images seen, raised ZeroDivisionError: division by zero",
        f"on_verdict, told of turning at {places['turning']} images seen, has not returned within 0.2 s",
        f"on_verdict, told of memorizing at {places['memorizing']} images seen, raised SystemExit: 3",
    ]


def test_a_command_reads_what_changed_and_is_killed_when_it_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mlflow_icr.tracking.reactions.SECONDS", 5.0)
    command = (
        f'cat > {tmp_path}/$ICR_STATE.json; echo loud; echo "no room" >&2;'
        f" if [ $ICR_STATE = turning ]; then echo $ICR_PREVIOUS $ICR_IMAGES_SEEN > {tmp_path}/words; exit 3; fi;"
        f" if [ $ICR_STATE = memorizing ]; then sleep 60; fi"
    )
    tracker = Tracker(tmp_path / "run", [], on_verdict=command)
    record(tracker)
    tracker.close("FINISHED")
    (_, turned, memorizing) = changes()
    payload = json.loads((tmp_path / "turning.json").read_text())
    assert (payload["event"], payload["state"], payload["previous"]) == ("verdict", "turning", "generalizing")
    assert (payload["images_seen"], payload["output_dir"]) == (turned[2], str(tmp_path / "run"))
    assert (tmp_path / "words").read_text() == f"generalizing {turned[2]}\n"
    assert [r.getMessage() for r in caplog.records if r.name.startswith("mlflow_icr")] == [
        f"on_verdict, told of turning at {turned[2]:,} images seen, ended with status 3: no room",
        f"on_verdict, told of memorizing at {memorizing[2]:,} images seen, took longer than 5 s and was killed",
    ]


@pytest.fixture
def webhook() -> Iterator[tuple[ThreadingHTTPServer, list[dict[str, Any]], list[int]]]:
    """A server that notes what it is sent, and answers with the statuses of a list, then with 200."""
    told: list[dict[str, Any]] = []
    statuses: list[int] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = statuses.pop(0) if statuses else 200
            if status == 200:
                told.append(content | {"path": self.path})
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, told, statuses
    server.shutdown()


def test_a_webhook_is_tried_again_and_its_address_is_no_part_of_a_log(
    tmp_path: Path, webhook: tuple[ThreadingHTTPServer, list[dict[str, Any]], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    server, told, statuses = webhook
    statuses += [503, 429, 200, 404]
    url = f"http://me:hunter2@127.0.0.1:{server.server_port}/services/s3cret?token=t0ken"
    with caplog.at_level(logging.DEBUG):
        tracker = Tracker(tmp_path, [], on_verdict=url)
        record(tracker)
        tracker.close("FINISHED")
    assert [(one["state"], one["path"]) for one in told] == [
        ("generalizing", "/services/s3cret?token=t0ken"),
        ("memorizing", "/services/s3cret?token=t0ken"),
    ]
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("mlflow_icr") and r.levelno >= logging.WARNING]
    assert len(ours) == 2
    assert ours[0].startswith("on_verdict webhook at 127.0.0.1 does not take results (ConnectionError); training goes on")
    assert ours[1].startswith("on_verdict webhook at 127.0.0.1, told of turning at")
    assert ours[1].endswith("answered with status 404")
    kept = "".join(path.read_text() for path in tmp_path.glob("*.json*"))
    mine = "\n".join(f"{r.getMessage()} {r.exc_text}" for r in caplog.records if r.name.startswith("mlflow_icr"))
    for secret in ("hunter2", "s3cret", "t0ken"):
        assert secret not in mine + kept


def test_what_is_no_listener_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_verdict is empty; expected a function, a command or the address of a webhook"):
        Tracker(tmp_path, [], on_verdict=" ")
    Tracker(tmp_path, []).abandon()  # and the folder is nobody's
