"""On PYTHONPATH, has measurements denoise 32 images, not 256: a sixth of the time, where a test is not about their precision.

Python imports a module of this name at its start; what is changed is changed as soon as it is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FEW = 32


class FewErrors(MetaPathFinder):
    """Finds `mlflow_icr.monitoring.errors`, once, as it is, but for the number of images."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's spec, whose loader sets the number after it has loaded the module."""
        if name != "mlflow_icr.monitoring.errors":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_with_few(module: ModuleType) -> None:
            load(module)
            module.ERROR_IMAGES = FEW  # type: ignore[attr-defined]

        spec.loader.exec_module = load_with_few  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, FewErrors())
