"""Reactions to the verdict: each change of its state calls a function, a command or a webhook."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow_icr.monitoring.verdict import UNDECIDED
from mlflow_icr.tracking.operations import ALL
from mlflow_icr.tracking.sink import Sink

logger = logging.getLogger(__name__)

SECONDS = 30.0  # that a function, a command or an answer may take
NOT_NOW = {408, 425, 429}  # statuses below 500 that say nothing of what was sent


@dataclass(frozen=True)
class VerdictChange:
    """A change of the verdict's state at a measurement; numbers are images seen, or None.

    `run_id` is MLflow's, or None while it is not known.
    """

    state: str
    previous: str
    images_seen: int
    text: str
    turned_at_images_seen: int | None
    checkpoint_images_seen: int | None
    output_dir: str
    run_id: str | None

    @property
    def payload(self) -> dict[str, Any]:
        """The content for a command's standard input or a webhook, in JSON's types."""
        return {"event": "verdict", **asdict(self)}


Listener = Callable[[VerdictChange], object]


class Reaction(Sink):
    """Calls one listener at each change of the verdict's state, once, from a thread of its own.

    `listener` is a function, a shell command, or the http(s) address of a webhook. A failure, or a call that takes too long, is
    logged in one line and not repeated; a webhook that does not answer is tried again, like a server. `state` is that of the
    verdict before this process: changes that are in the log by then are not reported.
    """

    def __init__(self, listener: Listener | str, state: str = UNDECIDED) -> None:
        if not callable(listener) and not listener.strip():
            raise ValueError("on_verdict is empty; expected a function, a command or the address of a webhook")
        self._listener, self._before = listener, state
        self._url = not callable(listener) and listener.startswith(("http://", "https://"))
        self.remote = self._url
        # Not the whole address: the path of a webhook can be its secret.
        self.name = f"on_verdict webhook at {urlsplit(str(listener)).hostname}" if self._url else "on_verdict"

    def state_path(self, folder: Path) -> Path:
        """`on_verdict.json`: the state that was reported last."""
        return folder / "on_verdict.json"

    def open(self, opening: bool, *, offline: bool = False) -> None:
        """Begin with changes from now on, unless an earlier process has begun."""
        if "state" not in self.state.content:
            self.state.update(state=self._before)
            self.state.advance(ALL, self.log.end)

    def reachable(self) -> bool:
        """Whether the host of a webhook answers within 3 s, with any status."""
        import requests

        if not self._url:
            return True
        parts = urlsplit(str(self._listener))
        try:
            requests.head(f"{parts.scheme}://{parts.netloc}/", timeout=3.0, allow_redirects=False)
        except (requests.RequestException, ValueError):
            return False
        return True

    def tags(self, values: Mapping[str, str], step: int | None) -> None:
        """Call the listener if the verdict of a measurement has another state."""
        state, previous = values.get("verdict"), self.state.content["state"]
        if state is None or step is None or state == previous:
            return
        numbers = (values.get(f"verdict.{name}_images_seen") for name in ("turned_at", "checkpoint"))
        turned_at, checkpoint = (None if number is None else int(number) for number in numbers)
        text = values.get("verdict.text", "")
        change = VerdictChange(state, previous, step, text, turned_at, checkpoint, str(self.folder), self._run_id())
        problem = self._call_listener(change)
        self.state.update(state=state)
        if problem:
            logger.warning("%s, told of %s at %s images seen, %s", self.name, state, f"{step:,}", problem)

    def _run_id(self) -> str | None:
        try:
            run_id = json.loads((self.folder / "mlflow.json").read_text()).get("run_id")
        except (OSError, ValueError, AttributeError):
            return None
        return None if run_id is None else str(run_id)

    def _call_listener(self, change: VerdictChange) -> str:
        """Call the listener; returns what went wrong, or "". Raises ConnectionError if the server does not answer."""
        if callable(self._listener):
            return call(self._listener, change, SECONDS)
        if self._url:
            return post(self._listener, change.payload, SECONDS)
        return run(self._listener, change, SECONDS)


def call(listener: Listener, change: VerdictChange, seconds: float) -> str:
    """Call a function in a thread, which is abandoned if it does not return; returns what went wrong."""
    outcome: list[str] = []

    def work() -> None:
        try:
            listener(change)
        except BaseException as error:  # also an exit, which would end this thread without a word
            lines = str(error).strip().splitlines()
            outcome.append(f"raised {type(error).__name__}{': ' + lines[0][:200] if lines else ''}")
        else:
            outcome.append("")

    thread = threading.Thread(target=work, name="on_verdict", daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"has not returned within {seconds:g} s"


def run(command: str, change: VerdictChange, seconds: float) -> str:
    """Run a shell command, with the payload on its standard input and ICR_STATE and others in its environment.

    One that takes too long is killed with all that it has started. Returns what went wrong.
    """
    variables = {"STATE": change.state, "PREVIOUS": change.previous, "IMAGES_SEEN": change.images_seen}
    variables |= {"OUTPUT_DIR": change.output_dir, "RUN_ID": change.run_id or ""}
    environment = os.environ | {f"ICR_{name}": str(value) for name, value in variables.items()}
    with tempfile.TemporaryFile() as payload, tempfile.TemporaryFile() as errors:  # no pipe, which a child could keep open
        payload.write(json.dumps(change.payload).encode())
        payload.seek(0)
        outputs: dict[str, Any] = {"stdin": payload, "stdout": subprocess.DEVNULL, "stderr": errors}
        process = subprocess.Popen(command, shell=True, env=environment, start_new_session=True, **outputs)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            return f"took longer than {seconds:g} s and was killed"
        errors.seek(0)
        lines = errors.read(10_000).decode(errors="replace").strip().splitlines()
    last = "".join(filter(str.isprintable, lines[-1]))[:200] if lines else ""
    return f"ended with status {status}{': ' * bool(last)}{last}" if status else ""


def _kill(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def post(url: str, payload: Mapping[str, Any], seconds: float) -> str:
    """Post JSON to an address; returns what went wrong. Raises ConnectionError without an answer, or if the server is busy."""
    import requests

    try:
        answer = requests.post(url, json=dict(payload), timeout=seconds, allow_redirects=False)
    except (requests.ConnectionError, requests.Timeout) as error:  # whose text has the address
        raise ConnectionError(f"{type(error).__name__} at {urlsplit(url).hostname}") from None
    except (requests.RequestException, ValueError) as error:
        return f"could not be asked ({type(error).__name__})"
    if answer.status_code in NOT_NOW or answer.status_code >= 500:
        raise ConnectionError(f"status {answer.status_code} of {urlsplit(url).hostname}")
    return "" if answer.ok and not answer.is_redirect else f"answered with status {answer.status_code}"
