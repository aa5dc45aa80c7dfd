"""The page as PDF, printed by a browser that is there anyway: it knows the page's print style, and no library does."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from dpbudget.errors import MissingExtra

#: Names under which Chromium and its kin are found; ``DPBUDGET_BROWSER`` names another.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
_SECONDS = 120.0


def find_browser() -> str | None:
    """The browser that prints: ``DPBUDGET_BROWSER``, else the first that is installed."""
    named = os.environ.get("DPBUDGET_BROWSER")
    if named:
        return shutil.which(named)
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def print_pdf(page: bytes) -> bytes:
    """The page as PDF. Its bytes differ from one time to the next, as browsers write when they printed.

    Raises:
        MissingExtra: no browser is installed, or it did not print (DP090).
    """
    browser = find_browser()
    if browser is None:
        raise MissingExtra(
            "a PDF is printed by Chromium, which is not installed",
            hint="install chromium, or write --format html and print that page from any browser",
        )
    with tempfile.TemporaryDirectory(prefix="dpbudget-") as folder:
        source, target = Path(folder, "report.html"), Path(folder, "report.pdf")
        source.write_bytes(page)
        try:
            subprocess.run(_command(browser, folder, source, target), check=True, capture_output=True, timeout=_SECONDS)  # noqa: S603 - a fixed command
            return target.read_bytes()
        except (OSError, subprocess.SubprocessError) as error:
            raise MissingExtra(
                f"{os.path.basename(browser)} printed no page ({type(error).__name__})",
                hint="write --format html and print that page from any browser",
            ) from None


def _command(browser: str, folder: str, source: Path, target: Path) -> list[str]:
    """Without network, profile or first-run pages; the page has no script that could leave a sandbox."""
    options = [
        "--headless",
        "--disable-gpu",
        "--no-first-run",
        "--disable-extensions",
        "--disable-background-networking",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--no-sandbox")  # Chromium refuses to start as root otherwise
    profile, output = f"--user-data-dir={folder}/profile", f"--print-to-pdf={target}"
    return [browser, *options, profile, "--no-pdf-header-footer", output, source.as_uri()]
