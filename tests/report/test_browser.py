"""Pages in a real browser: what is drawn, what fits, what sorts, and that nothing is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_records import HOSTILE, record, study, two
from made_searches import search

from holdfast.report import search as searches
from holdfast.report.page import render

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync = pytest.importorskip("playwright.sync_api", reason="the page is drawn by playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with sync.sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


def hostile() -> str:
    runs = [
        two(0.8, 0.9, 0.7, seed=s, recipe=r, names=HOSTILE[:2], warnings=HOSTILE[2:3])
        for s in (0, 1)
        for r in (*HOSTILE, "plain", "\u202eright to left")
    ]
    return render(runs, title=HOSTILE[1])


PAGES = {
    "recipes": lambda: render(study()),
    "one run": lambda: render([two(0.8, 0.952, 0.741)]),
    "one task": lambda: render([record([[0.9]], kind="train")]),
    "many tasks": lambda: render([record([[0.5] * 12] * 12, names=[*"abcdefghijkl"])]),
    "hostile": hostile,
    "search": lambda: searches.render(search()),
}  # fmt: skip


def opened(browser: Any, tmp_path: Path, html: str, width: int = 1280, **how: Any) -> Any:
    """The page, and all that the browser complains of."""
    file = tmp_path / "report.html"
    file.write_text(html, encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 800}, **how)
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("dialog", lambda dialog: page.said.append(dialog.message))
    page.goto(file.as_uri())
    return page


FIT = "document.documentElement.scrollWidth <= window.innerWidth"
DRAWN = """[...document.images].map(image =>
    [image.complete, image.naturalWidth, image.naturalHeight, image.clientWidth])"""


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_drawn_fits_and_is_not_refused_anything(
    name: str, browser: Any, tmp_path: Path
) -> None:
    html = PAGES[name]()
    for width, scheme in ((1280, "light"), (400, "dark")):
        page = opened(browser, tmp_path, html, width, color_scheme=scheme)
        page.eval_on_selector_all("details", "all => all.forEach(each => each.open = true)")
        drawn = page.evaluate(DRAWN)
        assert drawn and all(ready and min(sizes) > 50 for ready, *sizes in drawn)
        assert page.evaluate(FIT), f"wider than {width} px"
        assert page.said == []
        page.close()


def test_dark_pages_are_dark_and_print_is_white(browser: Any, tmp_path: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = opened(browser, tmp_path, render(study()), color_scheme="light")
    dark = opened(browser, tmp_path, render(study()), color_scheme="dark")
    source = "document.images[0].currentSrc"
    assert light.evaluate(ground) == "rgb(246, 247, 249)" != dark.evaluate(ground)
    assert light.evaluate(source) != dark.evaluate(source)
    dark.emulate_media(media="print", color_scheme="light")
    assert dark.evaluate(ground) == "rgb(255, 255, 255)"
    assert len(dark.pdf()) > 10_000


def test_tables_sort_by_click_and_by_key(browser: Any, tmp_path: Path) -> None:
    runs = [two(new, 0.9, 0.7, recipe=name)
            for name, new in (("plain", 0.5), ("b", 0.9), ("c", 0.7), ("a", None))]  # fmt: skip
    page = opened(browser, tmp_path, render(runs))
    table = page.locator("table.sortable", has_text="old before").first

    def names() -> list[str]:
        found = table.locator("tbody th .name").all_inner_texts()
        return [str(text) for text in found]

    new = table.locator("thead th", has_text="new").first
    new.locator("button").click()
    assert names() == ["b", "c", "plain", "a"] and new.get_attribute("aria-sort") == "descending"
    new.locator("button").press("Enter")  # what was not measured stays last
    assert names() == ["plain", "c", "b", "a"] and new.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    assert names() == ["a", "b", "c", "plain"] and new.get_attribute("aria-sort") is None
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid", "the focus is seen"
    assert page.said == []


def test_without_its_script_a_page_says_the_same(browser: Any, tmp_path: Path) -> None:
    html = render(study())
    both = [
        opened(browser, tmp_path, html, java_script_enabled=on).locator("main").inner_text()
        for on in (True, False)
    ]
    assert both[0] == both[1] and "Take dps" in both[0]


def test_no_other_script_and_no_other_style_is_let_in(browser: Any, tmp_path: Path) -> None:
    html = render([two(0.8, 0.9, 0.7)])
    foreign = "<script>document.title = 'ran'</script><p style='color: red' id='p'>x</p>"
    page = opened(browser, tmp_path, html.replace("</main>", foreign + "</main>"))
    assert page.title() != "ran" and len(page.said) == 2
    assert page.evaluate("getComputedStyle(p).color") != "rgb(255, 0, 0)"
