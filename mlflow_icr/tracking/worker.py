"""The thread that delivers one lane of the event log to one sink, and tries again while the sink does not answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from mlflow_icr.tracking.event_log import Cursor, Entry, EventLog
from mlflow_icr.tracking.operations import from_content, halves
from mlflow_icr.tracking.sink import Failure, Sink, not_taken

logger = logging.getLogger(__name__)

PAUSES = (1.0, 2.0, 5.0, 15.0, 30.0)  # seconds between attempts while the sink does not answer
LAST_ATTEMPTS = 3  # at the end of a run, before the rest is left to the next process
# After an error that may be temporary, before the operation is set aside; a server gets more time.
UNCLEAR_ATTEMPTS = 3
LOOK_SECONDS = 2.0  # without progress, after which the waiting caller checks whether the sink answers


class Worker:
    """One lane of one sink. `quiet`: the caller reports failures."""

    def __init__(self, sink: Sink, lane: str, log: EventLog, *, quiet: bool = False) -> None:
        self.sink, self.lane, self.log = sink, lane, log
        self.failure: Exception | None = None  # of the last attempt
        self.cursor = sink.state.cursor(lane)
        self.delivered = 0
        self.attempts = self.failed = 0  # attempts, and failed attempts since a caller began to wait
        self._mark = 0  # the attempts at that moment
        self._quiet = quiet
        self._warned = sink.warned
        self._hurry = self._closing = self._abandoned = False
        self._unclear = 0  # failures in a row that may pass
        self._next_send = 0.0
        self._thread = threading.Thread(target=self._work, name=f"mlflow-icr {sink.name} {lane}", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Operations that are not delivered."""
        return self.log.count(self.cursor, self.lane)

    @property
    def alive(self) -> bool:
        """Whether it still tries."""
        return self._thread.is_alive()

    @property
    def done(self) -> bool:
        """Whether nothing waits."""
        return self.cursor.offset >= self.log.end.offset

    def hurry(self, *, closing: bool = False) -> None:
        """Skip the pause before the next attempt; `closing`: stop when everything is delivered, or delivery fails."""
        self.sink.look_again()
        with self.log.changed:
            self._mark, self.failed = self.attempts, 0
            self._hurry, self._closing = True, self._closing or closing
            self.log.changed.notify_all()

    def abandon(self) -> None:
        """Stop writing state: another process may use the folder."""
        with self.log.changed:
            self._abandoned = self._closing = True
            self.log.changed.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(0.2)

    def retry_refused(self) -> None:
        """Send refused operations again, in the caller's thread; those that are refused again get their new reason."""
        for key, entry in self.sink.state.refused.items():
            if entry["lane"] != self.lane or not entry["operation"]:
                continue
            try:
                self.sink.send(self.lane, [from_content(entry["operation"])], True)
            except Exception as error:  # of whatever kind: it stays set aside
                if self.sink.failure_of(error) is not Failure.OUTAGE:
                    refused = {key: {**entry, "why": self.sink.reason_of(error)}}
                    self.sink.state.update(refused={**self.sink.state.refused, **refused})
                continue
            self.sink.state.accept(key)
            self.delivered += 1

    def _due(self) -> bool:
        return not self.done and (self._hurry or self.log.urgent > self.cursor.offset or time.monotonic() >= self._next_send)

    def _wait(self) -> bool:
        """Wait for something to deliver; False when nothing more is to come."""
        with self.log.changed:
            while not self._due():
                if self._closing and (self.done or self._abandoned):
                    return False
                self.log.changed.wait(None if self.done else max(0.01, self._next_send - time.monotonic()))
            return not self._abandoned

    def _work(self) -> None:
        may_be_repeated, failures = True, 0
        while self._wait():
            self.attempts += 1
            try:
                batch, end = self.log.read(self.cursor, self.lane, self.sink.batch_of(self.lane), damaged=self._leave_out)
                if batch:
                    self.log.sync()
                    if (may_be_repeated or failures) and not self.sink.reachable():
                        raise ConnectionError("it does not answer")
                    self._deliver(batch, may_be_repeated)
                if self._abandoned:
                    return
                self.sink.state.advance(self.lane, end, write=bool(batch))
                self._progress(end, len(batch))
                may_be_repeated, failures = may_be_repeated and not batch, 0
            except Exception as error:  # whatever it is, it must not end a training
                may_be_repeated = True
                # Further than before if a part was sent, or only the file of the state could not be written.
                self.failure, self.cursor = error, self.sink.state.cursor(self.lane)
                self._warn_of(error)
                if not self._pause(failures):
                    return
                failures += 1

    def _progress(self, end: Cursor, count: int) -> None:
        with self.log.changed:
            self.cursor, self.failure, self._unclear, self.failed = end, None, 0, 0
            self.delivered += count
            if self.done:
                self._hurry = False
            self._next_send = time.monotonic() + self.sink.pace
            self.log.changed.notify_all()

    def _pause(self, failures: int) -> bool:
        """Wait for the next attempt; False when there is none."""
        with self.log.changed:
            self._hurry = self._mark == self.attempts  # a caller began to wait during this attempt: the next one is immediate
            self.failed += self.attempts > self._mark
            self.log.changed.notify_all()
            if self._abandoned or (self._closing and self.failed >= LAST_ATTEMPTS):
                return False
            longest = self.failed - 1 if self._closing else failures  # the caller waits for the end
            pause = PAUSES[min(max(0, longest), len(PAUSES) - 1)]
            self.log.changed.wait_for(lambda: self._hurry or self._abandoned, pause)
            self._hurry = True
            return not self._abandoned

    def _deliver(self, batch: Sequence[Entry], may_be_repeated: bool) -> None:
        """Send a batch; if part of it is refused, send its halves, until only the refused operation is set aside."""
        try:
            self.sink.send(self.lane, [entry.operation for entry in batch], may_be_repeated)
            return
        except Exception as error:  # every library behind a sink has its own
            failure = self.sink.failure_of(error)
            if failure is Failure.UNCLEAR and self._unclear + 1 < UNCLEAR_ATTEMPTS:
                self._unclear += 1
                raise
            if failure is Failure.OUTAGE or self._abandoned:
                raise
            why = self.sink.reason_of(error)
        parts = _parts(batch)
        if len(parts) == 1:
            (entry,) = batch
            self.sink.state.refuse(self.lane, entry.number, entry.operation, why)
            kind = type(entry.operation).__name__.lower()
            self._warn(f"{self.sink.name} refuses {kind} ({why})")
        else:
            for part in parts:
                self._deliver(part, True)
                if len(batch) > 1:  # else they are parts of one operation
                    self.sink.state.advance(self.lane, Cursor(part[-1].end, part[-1].number + 1))

    def _leave_out(self, number: int, why: str) -> None:
        self.sink.state.refuse(self.lane, number, None, why)
        self._warn(f"{self.log.path}, line {number + 1}, is left out ({why})")

    def _warn_of(self, error: Exception) -> None:
        if "failure" not in self._warned:
            self._warned.add("failure")
            self._warn(not_taken(self.sink.name, error, self.log.folder))
        logger.debug("%s failed", self.sink.name, exc_info=error)

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            if not self._quiet:
                logger.warning("%s", text)


def _parts(batch: Sequence[Entry]) -> list[Sequence[Entry]]:
    if len(batch) > 1:
        return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    (entry,) = batch
    return [[replace(entry, operation=part)] for part in halves(entry.operation)]


def drain(workers: Sequence[Worker], *, patience: int = 1, closing: bool = False) -> bool:
    """Wait until the workers have delivered everything; returns whether they have, with nothing set aside.

    A worker is no longer waited for after `patience` failed attempts since this call, after about 5 s without an answer, or
    when one operation takes longer than the sink allows.
    """
    for worker in workers:
        worker.hurry(closing=closing)
    state = {id(worker): (worker.cursor.offset, time.monotonic(), 0.0) for worker in workers}
    pending = [worker for worker in workers if not worker.done]
    while pending:
        for worker in list(pending):
            offset, since, looked = state[id(worker)]
            now = time.monotonic()
            if worker.cursor.offset != offset:
                state[id(worker)] = (worker.cursor.offset, now, 0.0)
            stalled = now - since > worker.sink.patience_of(worker.lane)
            if worker.done or worker.failed >= patience or not worker.alive or stalled:
                pending.remove(worker)
            elif worker.cursor.offset == offset and now - max(since, looked) > LOOK_SECONDS:
                if not worker.sink.reachable():
                    pending.remove(worker)
                state[id(worker)] = (offset, since, time.monotonic())
        if pending:
            with pending[0].log.changed:
                pending[0].log.changed.wait(0.05)
    return all(worker.done for worker in workers) and not any(worker.sink.state.refused for worker in workers)
