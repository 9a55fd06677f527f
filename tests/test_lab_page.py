"""The page of the lab in a real browser: deis lab in a process of its own, and Chromium without a window."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import deis

pytestmark = pytest.mark.browser
CHROMIUM = os.environ.get("DEIS_CHROMIUM")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path)}
PATIENCE = 90
"""Seconds to wait for anything, on a machine that may be busy."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one model, and beside it one that is not to be read."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("models/digits", "outside"):
        shutil.copytree(Path(deis.__file__).parent / "assets" / "mnist", folder / name)
    return folder / "models"


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[tuple[str, Path]]:
    """The address of the lab, and the file of what it says."""
    pytest.importorskip("gradio")
    said = models.parent / "said.txt"
    command = ["-c", "from deis.cli import main; main()", "lab", "--port", "0", "--no-browser", "--models", str(models)]
    with said.open("w") as file, subprocess.Popen([sys.executable, *command], stdout=file, stderr=file, env=ENVIRONMENT) as lab:
        try:
            yield wait(lambda: re.search(r"deis lab is at (http://127\.0\.0\.1:\d+/)", said.read_text())).group(1), said
        finally:
            lab.terminate()


def wait(found: Callable[[], Any]) -> Any:
    """Return the first true value of a function."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(0.05)
    raise TimeoutError("it did not come")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("DEIS_CHROMIUM names no Chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, server: tuple[str, Path]) -> Iterator[Any]:
    """The page, which is to log no error, to ask nobody but the lab, and to leave no stack trace behind."""
    address, said = server
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    found = context.new_page()
    wrong: list[str] = []
    found.on("console", lambda message: wrong.extend([message.text] * (message.type in ("error", "warning"))))
    found.on("pageerror", lambda error: wrong.extend([str(error)]))
    found.on("request", lambda request: wrong.extend([request.url] * (not request.url.startswith((address, "data:", "blob:")))))
    found.on("response", lambda response: wrong.extend([response.url] * (response.status >= 400)))
    found.set_default_timeout(1000 * PATIENCE)
    found.goto(address)
    found.wait_for_selector("#pictures img")
    yield found
    context.close()
    assert wrong == []
    assert "Traceback" not in said.read_text()


def source(page: Any, where: str) -> str | None:
    """Return the first picture within an element, as its address."""
    found: str | None = page.evaluate("where => document.querySelector(where + ' img')?.src", where)
    return found


def pixels(url: str | None) -> Any:
    assert url is not None
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return np.asarray(image)


def pressed(page: Any, button: str, where: str) -> str:
    """Press a button, and return the new picture."""
    before = source(page, where)
    page.click(button)
    wait(lambda: source(page, where) not in (None, before))
    return source(page, where) or ""


def choose(page: Any, tab: str, label: str, value: str) -> None:
    """Choose in a dropdown, or fill in a field."""
    field = page.locator(tab).get_by_label(re.compile(rf"^\s*{re.escape(label)}(?!\w)")).first
    field.fill(value)
    field.press("Enter")
    field.press("Tab")
    page.wait_for_timeout(300)  # the server answers a change, and a field that is filled meanwhile may lose what it holds


def test_a_changed_method_makes_a_new_picture_and_its_code_the_same(page: Any, tmp_path: Path) -> None:
    choose(page, "#tab-sample", "Method", "rhork_<tableau>")
    page.locator("#tab-sample").get_by_label("Tableau").first.wait_for()
    choose(page, "#tab-sample", "number input for NFE", "6")
    shown = pixels(pressed(page, "#sample", "#pictures"))
    assert "rhork_2heun, 6 evaluations each" in page.inner_text("#pictures")
    page.get_by_role("tab", name="Copy as Python").click()
    page.locator("#code").get_by_label("Copy").first.click()
    code = wait(lambda: page.evaluate("navigator.clipboard.readText()"))
    assert "deis.make_plan(model.sde, 'rhork_2heun', nfe=6)" in code
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=ENVIRONMENT)
    with Image.open(tmp_path / "lab.png") as image:
        np.testing.assert_array_equal(np.asarray(image), shown)


def test_the_way_of_another_picture_is_shown(page: Any) -> None:
    before = source(page, "#strip")
    choose(page, "#tab-sample", "number input for Picture", "4")
    wait(lambda: source(page, "#strip") not in (None, before))
    assert page.locator("#strip img").count() == 2 * 10 + 1
    page.get_by_role("tab", name="The plan").click()
    page.wait_for_selector("#plan img")
    assert "keep_p, newest first" in page.inner_text("#plan")


def test_side_by_side_and_in_two_dimensions(page: Any) -> None:
    page.get_by_role("tab", name="Side by side").click()
    choose(page, "#tab-side-by-side", "number input for Pictures", "2")
    pressed(page, "#compare", "#comparison")
    assert page.locator("#comparison img").count() == 3
    text = page.inner_text("#comparison")
    a, b = (float(number) for number in re.findall(r"Distance to the converged pictures: ([\d.]+)", text))
    assert 0 < b < a < 1
    page.get_by_role("tab", name="In two dimensions").click()
    assert pressed(page, "#move", "#moving").startswith("data:image/gif")
    assert "tab3, 6 evaluations" in page.inner_text("#moving")


def told(page: Any, message: str) -> bool:
    """Press the button, and tell whether the message comes."""
    page.click("#sample")
    wait(lambda: message in page.inner_text("#pictures"))
    return page.locator("#pictures .lab-error").count() == 1


def test_wrong_entries_are_told_and_the_page_goes_on(page: Any, models: Path) -> None:
    page.locator("#tab-sample").get_by_text("Grid and options").click()
    choose(page, "#tab-sample", "Power of the grid", "seven")
    assert told(page, "power='seven' must be a number greater than 0")
    choose(page, "#tab-sample", "Power of the grid", "")
    choose(page, "#tab-sample", "Options of the method", "nonsense=3")
    assert told(page, "does not take the options ['nonsense']")
    choose(page, "#tab-sample", "Options of the method", "")
    choose(page, "#tab-sample", "Method", "calibrated")
    choose(page, "#tab-sample", "number input for NFE", "60")
    assert told(page, "nfe=60: its own plans are of 3, 4, 5, 6, 7, 8, 9, 10 evaluations")
    choose(page, "#tab-sample", "number input for NFE", "4")
    choose(page, "#tab-sample", "Model", str(models.parent / "outside"))
    assert told(page, "is not there, or not below")
    choose(page, "#tab-sample", "Model", str(models / "digits"))
    pressed(page, "#sample", "#pictures")
    assert page.locator("#pictures .lab-error").count() == 0


def test_the_page_answers_while_the_network_is_busy(page: Any, browser: Any, server: tuple[str, Path]) -> None:
    choose(page, "#tab-sample", "number input for NFE", "100")
    choose(page, "#tab-sample", "number input for Pictures", "16")
    before = source(page, "#pictures")
    page.click("#sample")
    other = browser.new_page()
    other.set_default_timeout(1000 * PATIENCE)
    other.goto(server[0])
    other.get_by_role("tab", name="In two dimensions").click()
    choose(other, "#tab-plane", "number input for NFE", "2")
    pressed(other, "#move", "#moving")
    assert source(page, "#pictures") == before
    other.close()
    wait(lambda: source(page, "#pictures") not in (None, before))
