"""Write the pages of the site that come from the code: `python docs/build_pages.py`."""

from __future__ import annotations

from pathlib import Path

from mlflow_icr.monitoring.catalogue import catalogue_page

DOCS = Path(__file__).parent

if __name__ == "__main__":
    (DOCS / "metrics.md").write_text(catalogue_page())
