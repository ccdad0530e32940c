"""Read run folders of the format before the event log: their operations, and how many of them MLflow has.

`mlflow.jsonl` and `models.jsonl` held what MLflow was to get, `mlflow.json` and `models.json` how much of it had arrived, and
`logged/values.jsonl` a training's own values, with `logged/sent.json`. They are read once and not changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlflow_icr.extraction.files import write_whole
from mlflow_icr.tracking import operations as ops
from mlflow_icr.tracking.operations import LOGGED, MEASURED, SUMMARY, TABLE, to_line

OPERATIONS, MODELS, VALUES, SENT = "mlflow.jsonl", "models.jsonl", "logged/values.jsonl", "logged/sent.json"
Rows = dict[int, dict[str, float]]
Write = Callable[[str, bytes], object]


def _contents(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a file, none if it does not exist; damaged ones are empty."""
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            content = json.loads(line)
        except ValueError:
            content = {}
        yield content if isinstance(content, dict) else {}


def _state(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _operations(content: dict[str, Any], rows: Rows, write: Write) -> list[ops.Operation]:
    """The operations for one line of the earlier format; none for a damaged line."""
    try:
        match content.get("kind"):
            case "start":
                tags = [ops.Tags(content["tags"])] if content["tags"] else []
                return [ops.Params(content["params"]), *tags]
            case "tags":
                return [ops.Tags(content["tags"])]
            case "metrics":
                measured = content["values"].items() <= rows.get(content["step"], {}).items()
                return [ops.Metrics(content["step"], content["time"], content["values"], MEASURED if measured else SUMMARY)]
            case "points":
                return [ops.Metrics(step, time, {key: value}, LOGGED) for key, value, step, time in content["points"]]
            case "picture":
                return [ops.Picture(content["key"], content["step"], content["time"], content["path"])]
            case "table":
                write(content["to"], json.dumps(content["content"]).encode())
                folder, _, name = content["to"].rpartition("/")
                return [ops.File(content["to"], folder, TABLE, name.removesuffix(".json"))]
            case "artifact":
                return [ops.File(content["path"], content["to"] or "")]
            case "dataset":
                return [ops.Dataset(content["description"], content["context"])]
            case "model":
                times = [time for *_, time in content["points"]]
                values = {key: value for key, value, *_ in content["points"]}
                return [
                    ops.Model(
                        content["step"], max(times, default=0), content["path"], values, content["weights"], content["turning"]
                    )
                ]
            case "end":
                return [ops.End(content["status"], content["time"])]
    except (KeyError, TypeError, ValueError):
        pass
    return []


def _logged(content: dict[str, Any]) -> list[ops.Operation]:
    try:
        values = {key: float(value) for key, value in content["values"].items()}
        time, texts = round(content["time"] * 1000), content.get("texts", {})
        return [ops.Metrics(content["step"], time, values, LOGGED, texts, content.get("resumes", False))]
    except (KeyError, TypeError, ValueError):
        return []


def _parts(
    folder: Path, write: Callable[[str, bytes], object]
) -> tuple[list[list[ops.Operation]], list[list[ops.Operation]], list[ops.Operation]]:
    """The operations of each line of both outboxes, with the training's own values in place of their copies."""
    from mlflow_icr.monitoring.series import HISTORY

    rows: Rows = {int(row["images_seen"]): row for row in _contents(folder / HISTORY) if "images_seen" in row}
    outbox = [_operations(content, rows, write) for content in _contents(folder / OPERATIONS)]
    models = [_operations(content, rows, write) for content in _contents(folder / MODELS)]
    logged = [operation for content in _contents(folder / VALUES) for operation in _logged(content)]
    return outbox, models, logged


def earlier_operations(folder: Path) -> Iterator[ops.Operation]:
    """The operations of a folder of the earlier format, in order; none if it is no such folder."""
    outbox, models, _ = _parts(folder, lambda name, content: None)
    for part in (*outbox, *models):
        yield from part


def write_events(folder: Path, path: Path) -> None:
    """Write the event log of a folder, converted if it has the earlier format, with MLflow's cursors. Raises OSError."""

    def keep(name: str, content: bytes) -> None:
        write_whole(folder / name, lambda file: file.write(content))

    outbox, models, logged = _parts(folder, keep)
    operations: list[ops.Operation] = []
    places: list[int] = []  # for each line of both outboxes, how many operations end it
    for part in (*outbox, *models):
        # Its copies in MLflow's outbox have no texts, and not what the training took back.
        operations += [o for o in part if not (logged and isinstance(o, ops.Metrics) and o.source == LOGGED)]
        places.append(len(operations))
    before = len(operations)
    operations += logged
    lines = [to_line(operation) for operation in operations]
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line.encode()))
    state = _state(folder / "mlflow.json")
    if "acknowledged" in state:
        # Values that MLflow did not get are sent again, also if it has later ones: it keeps each point once.
        acknowledged, taken = state["acknowledged"], _state(folder / "models.json").get("acknowledged", 0)
        points = places[acknowledged - 1] if acknowledged else 0
        kept = places[len(outbox) + taken - 1] if taken else 0
        if points == (places[len(outbox) - 1] if outbox else 0) and _has_sent_all(folder):
            points = before + len(logged)
        cursors = {lane: [offsets[n], n] for lane, n in (("points", points), ("files", points), ("models", kept))}
        models_state = _state(folder / "models.json")
        state = {key: state[key] for key in ("run_id", "experiment_id", "key") if key in state}
        state |= {"cursors": cursors, "refused": {}, "log_models": models_state.get("log_models", "none")}
        keep("mlflow.json", json.dumps(state).encode())
    write_whole(path, lambda file: file.write("".join(lines).encode()))


def _has_sent_all(folder: Path) -> bool:
    sent = _state(folder / SENT).get("MLflow", 0)
    return not (folder / VALUES).exists() or sent >= (folder / VALUES).stat().st_size
