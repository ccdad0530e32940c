"""Accelerate: `Accelerator(log_with=ICRTracker(folder))` brings what a script logs into the folder, MLflow and TensorBoard."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate.tracking import GeneralTracker, on_main_process
from PIL import Image

from mlflow_icr.integrations.pictures import as_pictures
from mlflow_icr.tracking import Logged, Tracker, check_folder, folder_tracker
from mlflow_icr.tracking.ending import end_at_exit, exit_on_signals
from mlflow_icr.tracking.keys import file_key, plain_values
from mlflow_icr.tracking.logged import FOLDER

logger = logging.getLogger(__name__)
Method = TypeVar("Method", bound=Callable[..., Any])


def _main(method: Method) -> Method:
    """Accelerate's decorator for methods that run on the main process only, with the method's type."""
    return on_main_process(method)


class ICRTracker(GeneralTracker):  # type: ignore[misc]
    """Writes what `accelerator.log`, `log_images` and `log_table` get into `output_dir/logged`, MLflow and TensorBoard.

    Values are logged at the script's own steps or, with `images_per_step` (images in a step), at images seen, like
    measurements. Numbers may be Python's, numpy's or 0-d tensors on any device, in nested dicts and short lists; anything else
    is kept as text. The run starts with `init_trackers`, on the main process alone, and ends with `end_training`: FINISHED. An
    exception that ends the program leaves it FAILED; Ctrl-C, SIGTERM and a closed terminal leave it KILLED. `tracker` is the
    Tracker to `record` measurements with. With `resume` it continues in the folder, and in its MLflow run. Raises ValueError,
    before training, for a folder that holds a run already.
    """

    name = "icr"
    requires_logging_directory = False
    main_process_only = True

    def __init__(
        self,
        output_dir: Path | str,
        *,
        images_per_step: int | None = None,
        run_name: str | None = None,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
        resume: bool = False,
    ) -> None:
        super().__init__()
        if images_per_step is not None and images_per_step < 1:
            raise ValueError(f"images_per_step is {images_per_step}; expected at least 1, or None")
        if os.environ.get("RANK", "0") == "0":  # another rank may come here after the first has begun the run
            check_folder(output_dir, resume)
        self.output_dir, self.images_per_step = Path(output_dir), images_per_step
        self.run_name, self.params, self.tags, self.resume = run_name, dict(params or {}), dict(tags or {}), resume
        self._tracker: Tracker | None = None
        self._cancel_exit: Callable[[], None] = lambda: None
        self._undo_signals: Callable[[], None] = lambda: None
        self._count, self._begun = 0, False
        self._warned: set[str] = set()

    @property
    def tracker(self) -> Tracker:
        """The Tracker of journal, MLflow and TensorBoard, on the main process; it opens the run if it has not begun."""
        if self._tracker is None:
            self._tracker = folder_tracker(self.output_dir, run_name=self.run_name, resume=self.resume)
            self._tracker.ends_by_itself = False
            self._tracker.open(self.params, self.tags)
            self.start()
        return self._tracker

    @_main
    def start(self) -> None:
        """Start tracking. The run is made at the first value, so its parameters are the configuration, which comes before."""
        if not self._begun:
            import mlflow  # noqa: F401 - its exit handler, which ends its runs, must be registered before ours

            self._begun, self._cancel_exit, self._undo_signals = True, end_at_exit(self._close), exit_on_signals()

    @_main
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Log the script's configuration as the run's parameters, nested dicts joined with `/`."""
        numbers, texts = plain_values(values)
        plain = {str(key): value for key, value in values.items() if isinstance(value, (bool, int, float, str))}
        self.params |= {**numbers, **texts, **plain}  # as in the script: 64, not 64.0
        if self._tracker is not None:
            self._log({}, {"configuration": json.dumps(self.params, default=str)}, 0)

    @_main
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log values at a step of the script; without a step, at the one after the last."""
        at = self._at(step)
        self._log(*plain_values(values), at)

    @_main
    def log_images(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Show images by key: arrays, tensors or PIL images, one, a batch or a list; kept in `logged/images`."""
        at = self._at(step)
        for key, images in values.items():
            name = str(key)
            try:
                pictures = as_pictures(images)
            except (ValueError, TypeError) as error:
                self._warn_once(f"{name} is no picture ({error}); its images are not shown")
                continue
            for place, picture in enumerate(pictures):
                picture_key = name if len(pictures) == 1 else f"{name}/{place}"
                path = self.tracker.journal.folder / FOLDER / "images" / file_key(picture_key) / f"{at:012d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)
                self.tracker.picture(picture_key, path, at)

    @_main
    def log_table(
        self,
        table_name: str,
        columns: Sequence[str] | None = None,
        data: Sequence[Sequence[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Show a table, from columns and rows or from a pandas frame; kept in `tables/logged`, one file a step."""
        at = self._at(step)
        if dataframe is not None:
            columns, data = [str(c) for c in dataframe.columns], dataframe.to_numpy().tolist()
        if not data:
            return
        names = list(columns) if columns is not None else [f"column_{i}" for i in range(len(data[0]))]
        if any(len(row) != len(names) for row in data):
            self._warn_once(f"table {table_name} has rows of other lengths than its {len(names)} columns; it is not shown")
            return
        plain = (bool, int, float, str)
        rows = [{n: v if isinstance(v, plain) else str(v) for n, v in zip(names, row, strict=True)} for row in data]
        self.tracker.table(f"{FOLDER}/{file_key(table_name)}/{at:012d}", rows, at)

    @_main
    def finish(self) -> None:
        """End the run as FINISHED; `accelerator.end_training()` calls it."""
        self.close("FINISHED")

    def close(self, status: str) -> None:
        """End the run with a status, FINISHED, FAILED or KILLED. Does nothing the second time, or if no run has begun."""
        self._cancel_exit()
        self._close(status)

    def _close(self, status: str) -> None:
        if self._begun:
            self.tracker.close(status)
            self._undo_signals()
            self._tracker, self._begun = None, False
            self.resume = True  # values that are logged after the end go to the same run

    def _at(self, step: int | None) -> int:
        self._count = self._count + 1 if step is None else int(step)
        return max(0, self._count) * (self.images_per_step or 1)

    def _log(self, values: Mapping[str, float], texts: Mapping[str, str], at: int) -> None:
        self.tracker.log(Logged(at, time.time(), values, texts))

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning(text)
