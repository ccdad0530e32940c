"""A real browser for tests: Chromium of the system, run by Playwright, with every request that a page makes noted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
PHONE, DESK = (390, 844), (1280, 900)  # pixels


@dataclass
class Visit:
    """An open page, the addresses that it has asked for, and what it complained of."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def remote(self) -> list[str]:
        """Requests that leave the page's own file: neither a file nor content that is in the page."""
        return [address for address in self.requests if not address.startswith(("file:", "data:", "blob:", "about:"))]


def chromium() -> str:
    """The browser's path; skips the test where there is none, or no Playwright to run it."""
    pytest.importorskip("playwright", reason="Playwright is not installed (pip install 'mlflow-icr[dev]')")
    found = (
        os.environ.get("CHROMIUM")
        or shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not found:
        pytest.skip("there is no Chromium (Debian: apt install chromium; or name one in CHROMIUM)")
    return found


@contextmanager
def opened(address: str, *, size: tuple[int, int] = DESK, dark: bool = False, scripts: bool = True) -> Iterator[Visit]:
    """A page that was opened and has loaded."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        try:
            scheme: Literal["dark", "light"] = "dark" if dark else "light"
            view = {"width": size[0], "height": size[1]}
            context = browser.new_context(viewport=view, color_scheme=scheme, java_script_enabled=scripts)
            visit = Visit(context.new_page())
            visit.page.on("request", lambda request: visit.requests.append(request.url))
            visit.page.on("console", lambda message: visit.complaints.append(message.text))
            visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
            visit.page.goto(address, wait_until="load", timeout=120_000)
            yield visit
        finally:
            browser.close()
