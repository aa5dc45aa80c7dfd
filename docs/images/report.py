"""Makes the picture of a report: ``python docs/images/report.py [FOLDER]`` writes report.png, here if not told.

Needs Chromium and the development extra. Runs and heads are random and fonts are the machine's, so that the bytes
differ from one time to the next; the numbers do not.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

import dpbudget
from dpbudget.ledger.signing import Ed25519Signer
from dpbudget.report.make import make_report
from dpbudget.report.page import page
from dpbudget.report.pdf import find_browser

HERE = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
HEIGHT, GAP, SHADE = 1180, 28, "#d7dbe0"


def report(folder: Path) -> Path:
    """The page of a ledger with two runs, one of which is half way."""
    owner, writer = Ed25519Signer.from_seed(b"\x01" * 32), Ed25519Signer.from_seed(b"\x02" * 32)
    budget = dpbudget.Budget(epsilon=3.0, delta=1e-5)
    place = folder / "hospital.ledger"
    ledger = dpbudget.create_ledger(place, budget=budget, owner=owner, writer=writer, whole_budget=True)
    facts = {"delta": 1e-5, "dataset_size": 60_000, "batch_size": 600}
    plans = [dpbudget.calibrate(epsilon=epsilon, steps=steps, **facts) for epsilon, steps in ((1.6, 600), (1.2, 400))]
    runs = [ledger.sign_plan(plan, owner=owner) for plan in plans]
    for run_id, steps in zip(runs, (600, 200), strict=True):
        with dpbudget.start(ledger, run_id) as run:
            for _ in range(steps):
                run.next_receipt()
    head = str(ledger.head)
    ledger.close()
    target = folder / "report.html"
    target.write_bytes(page(make_report(place, trust=owner.public, expect_head=head)))
    return target


def shot(browser: Browser, source: Path, width: int, scheme: str, top: str = "") -> Image.Image:
    """A part of the page, as wide as a window and ``HEIGHT`` high, from a section on."""
    context = browser.new_context(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(source.as_uri() + top)
    picture = Image.open(io.BytesIO(tab.screenshot()))
    context.close()
    return picture


def main() -> None:
    """The page on a desk by day, and on a phone by night."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        source = report(Path(folder))
        parts = [shot(browser, source, 880, "light"), shot(browser, source, 390, "dark", "#attack")]
        browser.close()
    whole = Image.new("RGB", (sum(part.width for part in parts) + 3 * GAP, HEIGHT + 2 * GAP), SHADE)
    left = GAP
    for part in parts:
        whole.paste(part, (left, GAP))
        left += part.width + GAP
    whole.quantize(96, dither=Image.Dither.NONE).save(HERE / "report.png", optimize=True)


main()
