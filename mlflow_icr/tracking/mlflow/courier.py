"""The courier: a thread that delivers an outbox in order, and goes on trying while the server is away."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from mlflow_icr.tracking.mlflow.delivery import RefusalError
from mlflow_icr.tracking.mlflow.outbox import Operation, Outbox
from mlflow_icr.tracking.mlflow.store import without_credentials

logger = logging.getLogger(__name__)

PAUSES = (1.0, 2.0, 5.0, 15.0, 30.0)  # seconds from one attempt to the next, as long as the server does not answer
LAST_ATTEMPTS = 3  # at the end of a run, before what waits is left to the next process
STALLED_SECONDS = 90.0  # without any progress, after which the end of a run is not waited for


class Sender(Protocol):
    """What does one operation; `doubtful` when it may have arrived before, in part or as a whole."""

    def send(self, operation: Operation, *, doubtful: bool) -> None:
        """Raises RefusalError for what the server does not want, and anything where it does not answer."""


class Courier:
    """Delivers `box` by `sender`; `what` names its content in warnings. Couriers of one run share the condition `wake`.

    It sets out only while `may_go`; `stalled_seconds` is how long `flush` waits for one operation.
    """

    def __init__(
        self,
        box: Outbox,
        sender: Sender,
        wake: threading.Condition,
        *,
        what: str = "results",
        may_go: Callable[[], bool] = lambda: True,
        stalled_seconds: float = STALLED_SECONDS,
    ) -> None:
        self.box, self.what = box, what
        self.failure: Exception | None = None  # of the last attempt
        self._sender, self._wake, self._may_go, self._stalled = sender, wake, may_go, stalled_seconds
        self._told: set[str] = set()
        self._closing = False
        self._hurry = False  # somebody waits: the pause before the next attempt is over
        # How many attempts there were, at which one somebody began to wait, and how many have failed since.
        self._attempts = self._mark = self._failed = 0
        self._thread: threading.Thread | None = None

    def say(self, operations: Sequence[Operation], *, sync: bool = True) -> None:
        """Put operations into the outbox, on the disk at once or before they are sent. Raises OSError when the disk is full."""
        with self._wake:
            self.box.append(operations, sync=sync)
            self._wake.notify_all()
        self.set_out()

    def set_out(self) -> None:
        """Start delivering, if that has not begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"mlflow-icr {self.what}", daemon=True)
            self._thread.start()

    def flush(self, patience: int = 1) -> bool:
        """Wait until everything is delivered (True), or `patience` attempts that began after this call have failed (False)."""
        box = self.box
        with self._wake:
            self._mark, self._failed = self._attempts, 0
            self._hurry = True
            self._wake.notify_all()
        self.set_out()
        left, since = len(box.waiting), time.monotonic()
        while box.waiting and self._failed < patience and time.monotonic() - since < self._stalled:
            if not self._may_go():
                break
            with self._wake:
                self._wake.wait(0.1)
            if len(box.waiting) < left:
                left, since = len(box.waiting), time.monotonic()
        return not box.waiting and not box.refused

    def finish(self) -> bool:
        """Deliver what waits, as far as that can be done now, and stop; returns whether everything has arrived."""
        with self._wake:
            self._closing = True
        return self.flush(LAST_ATTEMPTS)

    def _ready(self) -> bool:
        return bool(self.box.waiting) and self._may_go()

    def _work(self) -> None:
        """Deliver what waits, in a thread of its own, until told to stop."""
        doubtful = True  # an earlier process may have tried
        failures = 0  # in a row
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._ready() or self._closing)
                if not self._ready():
                    return
                operation = self.box.waiting[0][1]
                self._attempts += 1
                self._hurry = False
            try:
                self.box.sync()
                refusal = self._attempt(operation, doubtful)
                self.box.acknowledge(refusal)  # which waits for the disk, and nobody is to wait for that
                with self._wake:
                    self._wake.notify_all()
                self.failure, doubtful, failures = None, False, 0
            except Exception as error:  # whatever it is, it must not end a training
                self.failure, doubtful = error, True
                self._tell_failure(error)
                with self._wake:
                    self._failed += self._attempts > self._mark
                    self._wake.notify_all()
                    if self._closing and self._failed >= LAST_ATTEMPTS:
                        return
                    self._wake.wait_for(lambda: self._hurry, PAUSES[min(failures, len(PAUSES) - 1)])
                failures += 1

    def _attempt(self, operation: Operation, doubtful: bool) -> str:
        """Send one operation; returns why the server does not want it, or nothing."""
        try:
            self._sender.send(operation, doubtful=doubtful)
        except RefusalError as error:
            why = without_credentials(str(error))
            self._tell(f"MLflow does not want {operation['kind']} ({why})")
            return why
        return ""

    def _tell_failure(self, error: Exception) -> None:
        # The type only: a tracking URI, which may hold a password, can be part of the message.
        if "failure" not in self._told:
            self._told.add("failure")
            logger.warning(
                "MLflow does not take %s (%s); training goes on, and everything measured is in %s",
                self.what, type(error).__name__, self.box.folder,
            )  # fmt: skip
        logger.debug("MLflow failed", exc_info=error)

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)
