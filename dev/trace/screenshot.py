"""A picture of the page, taken by Chromium (or Chrome) without a window."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_TIMEOUT_S = 120


def find_browser() -> str | None:
    """Path of a browser; the environment variable ``BROWSER_PATH`` goes before what is found."""
    told = os.environ.get("BROWSER_PATH")
    return told or next(filter(None, map(shutil.which, BROWSERS)), None)


def take_screenshot(
    page: str, output: Path, *, size: tuple[int, int], frame: int, is_dark: bool
) -> None:
    """Show a page at a frame and save what is seen, at twice the resolution.

    Raises:
        RuntimeError: there is no browser, or it took no picture; the message says what it said.
    """
    browser = find_browser()
    if browser is None:
        raise RuntimeError(
            f"a picture needs one of {', '.join(BROWSERS)}: install it (apt-get install chromium) "
            "or name it in BROWSER_PATH"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        result = subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",  # in a container there is none; the page is our own
                "--disable-gpu",
                "--hide-scrollbars",
                "--run-all-compositor-stages-before-draw",  # all of it, however busy the machine
                "--force-device-scale-factor=2",
                f"--window-size={size[0]},{size[1]}",
                f"--user-data-dir={folder}/profile",
                "--virtual-time-budget=3000",
                f"--screenshot={output.resolve()}",
                f"{file.as_uri()}#{frame}{',dark' if is_dark else ''}",
            ],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    if result.returncode or not output.is_file():
        raise RuntimeError(f"{browser} took no picture: {result.stderr.strip()[-500:]}")
