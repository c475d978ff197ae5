"""The page in a real Chromium. One command: pytest -m browser tests/serve/test_browser.py (needs Debian's chromium and
pip install 'condit[browser]'). CONDIT_SCREENSHOTS=FOLDER keeps screenshots."""

import base64
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest_serve import Running, picture

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT = 60_000  # ms; a loaded machine is slow
FORMS = {"desktop-en": (1280, 900, "en"), "phone-zh": (390, 844, "zh")}
DROP = """([selector, name, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "image/png" }));
  const how = { bubbles: true, cancelable: true, dataTransfer: transfer };
  document.querySelector(selector).dispatchEvent(new DragEvent("drop", how));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=FORMS)
def page(request, browser, live: Running):
    """The page, ready; the test fails for a console error, or a request to another host."""
    width, height, language = FORMS[request.param]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        locale={"en": "en-US", "zh": "zh-CN"}[language],
        color_scheme="dark" if language == "zh" else "light",
        has_touch=width < 500,
    )
    page, errors, foreign = context.new_page(), [], []
    page.set_default_timeout(WAIT)
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((live.url, "data:", "blob:")) else foreign.append(r.url))
    page.goto(live.url)
    page.wait_for_selector("body[data-ready]")
    page.form = request.param
    yield page
    context.close()
    assert errors == [] and foreign == []


def drop(page, name: str, data: bytes, selector: str = "#drop") -> None:
    page.evaluate(DROP, [selector, name, base64.b64encode(data).decode()])


def shoot(page, name: str) -> None:
    folder = os.environ.get("CONDIT_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}-{page.form}.png"), full_page=True)


def finished(page, images: int) -> None:
    page.locator("#gallery figcaption").nth(images - 1).wait_for()  # the page's CSP forbids wait_for_function
    page.wait_for_selector("#go:not([disabled])")


def saved(page) -> bytes:
    return base64.b64decode(page.get_attribute("#gallery figure:first-child > img", "src").partition(",")[2])


def recipe(png: bytes) -> dict:
    from condit.data.images import read_recipe

    return json.loads(json.dumps(read_recipe(png)))["request"]


def steps(page, number: int) -> None:
    page.evaluate("document.querySelector('details').open = true")
    page.fill("#steps", str(number))


def test_a_reference_a_strength_and_a_region_make_an_image_that_comes_back_from_its_png(page):
    page.fill("#prompt", "a red apple" if page.form.endswith("en") else "红苹果")
    drop(page, "ref.png", picture(1))
    page.wait_for_selector("#references li")
    page.fill("#references input[type=range]", "0.6")
    page.click("#references button:has-text('%s')" % ("Region" if page.form.endswith("en") else "区域"))
    box = page.locator("#brush").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 80)
    page.mouse.up()
    shoot(page, "region")
    page.click("#mask-save")
    steps(page, 4)
    page.fill("#seed", "7")
    page.click("#lock")
    page.keyboard.press("Control+Enter")
    finished(page, 1)
    shoot(page, "generated")
    kept = recipe(saved(page))
    (reference,) = kept["references"]
    assert (kept["seed"], kept["steps"], reference["strength"]) == (7, 4, 0.6)
    assert reference["mask"].startswith("data:image/png")
    first = saved(page)
    page.reload()
    page.wait_for_selector("body[data-ready]")
    drop(page, "kept.png", first)
    page.wait_for_selector("#references li")
    assert page.input_value("#seed") == "7" and page.input_value("#steps") == "4"
    page.click("#go")
    finished(page, 1)
    assert recipe(saved(page)) == kept and saved(page) == first


def test_cancelling_frees_the_place(page, live: Running):
    page.fill("#prompt", "a rocket")
    steps(page, 100)
    page.click("#go")
    page.wait_for_selector("#progress[value]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#go:not([disabled])")
    page.wait_for_timeout(200)
    assert live.server.engine.waiting == [] and page.locator("#gallery figure").count() == 0
    shoot(page, "cancelled")


def test_a_sweep_makes_a_grid_and_two_images_are_compared(page):
    page.fill("#prompt", "a rocket")
    drop(page, "ref.png", picture(2))
    page.wait_for_selector("#references li")
    steps(page, 2)
    page.select_option("#sweep", "strength")
    page.fill("#values", "0, 0.5, 1")
    page.click("#go")
    finished(page, 3)
    captions = " ".join(page.locator("figcaption").all_inner_texts())
    assert all(f"style {value}" in captions for value in ("0", "0.5", "1"))
    shoot(page, "sweep")
    for number in (0, 1):
        page.locator("#gallery figure").nth(number).locator("button").nth(1).click()
    page.wait_for_selector("#compare[open]")
    page.fill("#cut", "20")
    shoot(page, "compare")
    page.keyboard.press("Escape")
    page.locator("#gallery figure").first.locator("[data-t=command]").click()
    assert page.inner_text("#code-text").startswith("condit generate 'a rocket' --model tiny --style 'ref.png:")
    page.click("#code-close")
    page.locator("#gallery figure").first.locator("[data-t=asReference]").click()
    assert page.locator("#references li").count() == 2


def test_words_edit_an_image(page):
    page.locator("[value=edit]").check(force=True)
    drop(page, "apple.png", picture(3))
    page.wait_for_selector("#source-image:not([hidden])")
    page.fill("#source", "a red apple")
    page.fill("#prompt", "a rocket")
    steps(page, 2)
    page.click("#go")
    finished(page, 1)
    assert page.locator(".maps img").count() >= 2
    shoot(page, "edited")


def test_the_page_fits_its_width_and_every_control_has_a_name(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    nameless = """() => [...document.querySelectorAll("button, input, select, textarea, canvas")].filter((e) =>
      !e.textContent.trim() && !e.getAttribute("aria-label") && !(e.labels && e.labels.length)).map((e) => e.id)"""
    assert page.evaluate(nameless) == []
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_a_study_is_answered_by_keys(browser, run_server, tmp_path):
    from condit.data.images import load_image, save_image
    from condit.serve.study import make_study

    for number, method in enumerate(("a", "b")):
        save_image(load_image(picture(number)), tmp_path / method / "0.png")
    make_study(tmp_path / "study", {m: tmp_path / m for m in "ab"}, tmp_path / "a", question="Which?")
    with run_server(study=tmp_path / "study") as live:
        page, errors = browser.new_page(), []
        page.set_default_timeout(WAIT)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(f"{live.url}/study")
        page.wait_for_selector("body[data-ready]")
        page.fill("#rater", "Ann")
        page.keyboard.press("Enter")
        page.wait_for_selector("#ask:not([hidden])")
        for count, key in enumerate("120", 1):
            page.keyboard.press(key)
            page.get_by_text(f"{count} answers").wait_for()
        page.form = "desktop"
        shoot(page, "study")
        page.close()
    lines = (tmp_path / "study" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["choice"] for line in lines] == ["left", "right", "neither"] and errors == []
