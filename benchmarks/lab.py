"""Take a picture of each tab of `deis lab`, and time the first: python -m benchmarks.lab

It needs Gradio, Playwright, and a Chromium that the environment variable DEIS_CHROMIUM names. It writes docs/figures/lab.png,
lab-plan.png, lab-side-by-side.png and lab-two-dimensions.png, and prints the seconds from each press of a button to its picture.
"""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

from PIL import Image

from deis.cli.lab import free_port
from deis.lab.library import Library
from deis.lab.page import build, launch
from deis.lab.session import Session

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
SIZE = {"width": 1240, "height": 860}
PATIENCE = 120_000
"""Milliseconds to wait for anything."""


def save(page: Any, name: str) -> None:
    """Write what the window shows, in few colours."""
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(1000)
    with Image.open(io.BytesIO(page.screenshot(full_page=True))) as image:
        image.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(FIGURES / f"{name}.png", optimize=True)
    print(f"wrote docs/figures/{name}.png, {(FIGURES / f'{name}.png').stat().st_size // 1000} kB", flush=True)


def press(page: Any, button: str, where: str) -> None:
    """Press a button, wait for the new picture, and print the seconds that it took."""
    picture = f"document.querySelector('{where} img')?.src"
    before, start = page.evaluate(picture), time.perf_counter()
    page.click(button)
    page.wait_for_function(f"before => {picture} && {picture} !== before", arg=before, timeout=PATIENCE)
    print(f"{button}: {time.perf_counter() - start:.2f} s, load {os.getloadavg()[0]:.1f}", flush=True)


def visit(page: Any) -> None:
    """Visit every tab, and save its picture."""
    page.wait_for_selector("#pictures img", timeout=PATIENCE)
    for seed in ("1", "2", "0"):
        page.get_by_label("Seed").first.fill(seed)
        press(page, "#sample", "#pictures")
    save(page, "lab")
    page.get_by_role("tab", name="The plan").click()
    save(page, "lab-plan")
    page.get_by_role("tab", name="Side by side").click()
    press(page, "#compare", "#comparison")
    save(page, "lab-side-by-side")
    page.get_by_role("tab", name="In two dimensions").click()
    press(page, "#move", "#moving")
    page.wait_for_timeout(2000)  # on their way
    save(page, "lab-two-dimensions")


def main() -> None:
    from playwright.sync_api import sync_playwright

    start = time.perf_counter()
    lab = build(Session(Library()))
    print(f"the page is built: {time.perf_counter() - start:.1f} s, load {os.getloadavg()[0]:.1f}")
    address = launch(lab, "127.0.0.1", free_port("127.0.0.1", 0), wait=False)
    FIGURES.mkdir(exist_ok=True)
    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=os.environ["DEIS_CHROMIUM"], args=["--no-sandbox"])
        page = chromium.new_page(viewport=SIZE)
        page.goto(address)
        visit(page)
        chromium.close()
    lab.close()


if __name__ == "__main__":
    main()
