"""The page in a real browser: it asks for nothing, complains of nothing, fits every width, and axe finds no fault.

Chromium is Debian's package; what drives it and axe-core come with the Python package axe-playwright-python.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from reportkit import Shelf

from dpbudget.report.page import page
from dpbudget.report.pdf import find_browser, print_pdf

CHROMIUM = find_browser()
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.skipif(
        importlib.util.find_spec("axe_playwright_python") is None, reason="pip install axe-playwright-python"
    ),
]
NAMES = ["two", "phases", "rdp", "waiting", "empty", "changed", "missed"]
SIZES = {"phone": (390, 844), "desk": (1280, 900)}
#: Each page once by default, "two" in all four ways; the rest in the slow suite.
BY_DEFAULT = {
    ("phases", "desk", "dark"), ("rdp", "phone", "light"), ("waiting", "desk", "light"), ("empty", "phone", "dark"),
    ("changed", "phone", "dark"), ("missed", "phone", "light"),
}  # fmt: skip
WAYS = [
    pytest.param(*way, marks=[] if way[0] == "two" or way in BY_DEFAULT else [pytest.mark.slow])
    for way in product(NAMES, sorted(SIZES), ["light", "dark"])
]


@pytest.fixture(scope="module")
def pages(shelf: Shelf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by name, as files; one of a history that was not expected."""
    folder, found = tmp_path_factory.mktemp("pages"), {}
    for name in NAMES:
        document = shelf.report("one", expect_head=f"3:{'ab' * 32}") if name == "missed" else shelf.report(name)
        found[name] = folder / f"{name}.html"
        found[name].write_bytes(page(document))
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def axe() -> str:
    """axe-core, as the package ships it."""
    spec = importlib.util.find_spec("axe_playwright_python")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "size", "scheme"), WAYS)
def test_a_page_is_quiet_fits_and_is_accessible(
    browser: Any, pages: dict[str, Path], name: str, size: str, scheme: str
) -> None:
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    try:
        tab, said, asked = context.new_page(), [], []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(pages[name].as_uri())
        assert said == []
        assert asked == [pages[name].as_uri()]
        # Wide tables scroll in a box of their own; the page does not.
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        over = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg, .skip, .unseen') && "
        over += "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        assert tab.evaluate(over) == []
        tab.evaluate(axe())
        found = tab.evaluate("axe.run()")
        assert [(item["id"], [node["html"][:90] for node in item["nodes"]]) for item in found["violations"]] == []
        assert len(found["passes"]) > 20
    finally:
        context.close()


def test_a_page_can_be_walked_through_by_keyboard(browser: Any, pages: dict[str, Path]) -> None:
    tab = browser.new_page()
    try:
        tab.goto(pages["two"].as_uri())
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.textContent") == "Skip to the report"
        assert tab.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
        tab.keyboard.press("Enter")
        assert tab.evaluate("location.hash") == "#main"
    finally:
        tab.close()


def test_paper_gets_the_light_colours_and_every_section(pages: dict[str, Path]) -> None:
    data = print_pdf(pages["two"].read_bytes())
    assert data.startswith(b"%PDF-")
    assert len(data) < 1_000_000
    if shutil.which("pdftotext"):
        import subprocess

        text = subprocess.run(["pdftotext", "-", "-"], input=data, capture_output=True, check=True).stdout.decode()
        for title in ("The claim in plain words", "Budget", "What an attacker gains", "Plans", "Verification"):
            assert title in text
        assert "Skip to the report" not in text


def test_print_hides_what_only_a_screen_needs(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(color_scheme="dark")
    try:
        tab = context.new_page()
        tab.goto(pages["two"].as_uri())
        tab.emulate_media(media="print", color_scheme="dark")
        assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    finally:
        context.close()


def test_axe_finds_a_fault_where_there_is_one(browser: Any) -> None:
    tab = browser.new_page()
    try:
        tab.set_content(
            "<title>t</title><main><p style='color:#bbb'>faint</p><table><tr><td>1</td></tr></table></main>"
        )
        tab.evaluate(axe())
        found = {item["id"] for item in tab.evaluate("axe.run()")["violations"]}
        assert {"color-contrast", "html-has-lang"} <= found
    finally:
        tab.close()
