"""The operations of a report in the event log; its pictures and distributions are in the folder."""

from __future__ import annotations

import time

from mlflow_icr.monitoring.report import Report
from mlflow_icr.monitoring.series import distributions_path
from mlflow_icr.tracking.event_log import EventLog
from mlflow_icr.tracking.journal import Journal
from mlflow_icr.tracking.operations import DISTRIBUTIONS, File, Metrics, Operation, Picture, Tags


def now_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


def report_operations(report: Report, journal: Journal, now: int) -> list[Operation]:
    """The operations of a measurement that the journal has, also of one without values."""
    step = report.step
    found: list[Operation] = [Metrics(step, now, dict(report.values))]
    found += [Picture(key, step, now, journal.relative(journal.picture(key, step))) for key in report.figures]
    if report.distributions:
        path = journal.relative(distributions_path(journal.folder, step))
        found.append(File(path, None, DISTRIBUTIONS, DISTRIBUTIONS, step, now))
    return [*found, *text_operations(report, now)]


def text_operations(report: Report, now: int) -> list[Operation]:
    """The reasons why values are absent or uncertain."""
    texts = {f"absent.{key}": why for key, why in report.absent.items()}
    texts |= {f"warning.{key}": text for key, text in report.warnings.items()}
    return [Tags(texts, report.step, now)] if texts else []


def missing_operations(journal: Journal, log: EventLog) -> list[Operation]:
    """Operations of measurements that are in the journal but not in the log, after a kill or a power cut between the two."""
    there: set[tuple[str, int]] = set()
    newest = next(reversed(log.measured), None)
    if newest is not None:  # the kill may have come before its pictures
        there |= {_name(entry.operation) for entry in log.entries(log.measured[newest])}
    cut_off = [] if newest is None else [row for row in journal.rows[-1:] if int(row["images_seen"]) == newest]
    rows = [*cut_off, *(row for row in journal.rows if int(row["images_seen"]) not in log.measured)]
    parts = [part for row in rows for part in report_operations(journal.report(row), journal, now_ms())]
    return [part for part in parts if _name(part) not in there]


def _name(part: Operation) -> tuple[str, int]:
    """What is there once at a step."""
    match part:
        case Picture(key=key, step=step) | File(name=key, step=step):
            return key, step
        case Metrics(step=step):
            return "", step
        case _:
            return "", -1
