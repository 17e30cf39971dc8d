"""Takes a picture of each tab of the demo, as a visitor sees it who has used it, for docs/demo.md.

    pip install -e '.[browser]' && python docs/demo_pictures.py

It needs Chromium, serves the models that come with the package, and writes docs/demo/TAB.png, in 256 colours. What
edits are given was drawn by the first tab. On two CPU cores it takes some minutes.
"""

import io
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import demo_server  # noqa: E402

from unclip_jax.demo_page import NAMES  # noqa: E402
from unclip_jax.paths import SHIPPED  # noqa: E402

OUT = ROOT / "docs" / "demo"
APPLE, STAR = "a red apple on a blue background", "a star on a green background"
READY = 15_000  # milliseconds until an editor takes a picture, or has it: it shows neither
MINUTES = 60  # for what one tab draws, at most


def main() -> None:
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        place = Path(folder)
        with demo_server.serve(SHIPPED, place) as (_, address):
            program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1200, "height": 640})
            page.set_default_timeout(60_000 * MINUTES)
            page.goto(address)
            apple, star = (draw(page, prompt, place / f"{prompt[:6]}.png") for prompt in (APPLE, STAR))
            draw(page, APPLE)
            take(page, "draw")
            for name, fill in FILLED.items():
                began = time.monotonic()
                page.get_by_role("tab", name=NAMES[name], exact=True).click()
                fill(page, apple, star)
                page.click(f"#{name}-button")
                finished(page, name)
                take(page, name)
                print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def draw(page: Page, prompt: str, path: Path | None = None) -> Path | None:
    """Draws in the first tab; saves the first picture."""
    page.locator("#draw-prompt textarea").fill(prompt)
    page.click("#draw-button")
    page.wait_for_function(
        """title => {
            const shown = [...document.querySelectorAll('#draw-shown img')]
            return shown.length === 4 && shown.every(image => image.src.includes(title))
        }""",
        arg=prompt.replace(" ", "_"),
    )
    if path:
        source = page.locator("#draw-shown img").first.get_attribute("src")
        path.write_bytes(page.request.get(source).body())
    return path


def finished(page: Page, name: str) -> None:
    """Waits until a tab has answered with all that it was asked for. Raises RuntimeError with what it says instead."""
    count = 8 if name in ("interpolate", "text_diff") else 4
    page.wait_for_function(
        """([name, count]) => {
            const shown = [...document.querySelectorAll(`#${name}-shown img`)]
            const drawn = shown.length === count && shown.every(image => !image.src.includes('preview'))
            const told = document.querySelector('#classify-shown')?.innerText.includes('%')
            return (name === 'classify' ? told : drawn) || document.querySelector('[data-testid=toast-body]')
        }""",
        arg=[name, count],
    )
    if (said := page.locator("[data-testid=toast-body]")).count():
        raise RuntimeError(f"{name}: {said.first.inner_text()}")


def take(page: Page, name: str) -> None:
    """Takes the picture of a tab."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(2000)  # until nothing moves
    taken = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    taken.quantize(256, dither=Image.Dither.NONE).save(OUT / f"{name}.png", optimize=True)


def give(page: Page, element: str, path: Path) -> None:
    """Gives a picture to a component."""
    page.wait_for_timeout(READY)
    page.locator(f"#{element}-picture input[type=file]").first.set_input_files(path)
    page.wait_for_timeout(READY)


def fill_vary(page: Page, apple: Path, star: Path) -> None:
    give(page, "vary", apple)


def fill_interpolate(page: Page, apple: Path, star: Path) -> None:
    give(page, "interpolate-first", apple)
    give(page, "interpolate-second", star)


def fill_text_diff(page: Page, apple: Path, star: Path) -> None:
    give(page, "text_diff", apple)
    page.get_by_label("Before").fill("blue background")
    page.get_by_label("After").fill("yellow background")


def fill_inpaint(page: Page, apple: Path, star: Path) -> None:
    """Paints over the apple in the picture, enlarged: the editor shows its pixels one by one."""
    large = apple.with_name("large.png")
    Image.open(apple).resize((256, 256), Image.Resampling.NEAREST).save(large)
    give(page, "inpaint", large)
    page.locator("#inpaint-prompt textarea").fill("a yellow star on a blue background")
    canvas = page.locator("#inpaint-picture canvas").first
    canvas.scroll_into_view_if_needed()  # the mouse reaches only what is in the window
    box = canvas.bounding_box()
    for share in (0.3, 0.4, 0.5, 0.6, 0.7):
        x, y = box["x"] + box["width"] / 2, box["y"] + share * box["height"]
        page.mouse.move(x - 100, y)
        page.mouse.down()
        page.mouse.move(x + 100, y, steps=20)
        page.mouse.up()
        page.wait_for_timeout(500)


def fill_sdedit(page: Page, apple: Path, star: Path) -> None:
    """Gives a sketch of a red disc on blue."""
    sketch = Image.new("RGB", (256, 256), (35, 95, 225))
    ImageDraw.Draw(sketch).ellipse((48, 48, 208, 208), fill=(205, 30, 45))
    sketch.save(apple.with_name("sketch.png"))
    give(page, "sdedit", apple.with_name("sketch.png"))
    page.locator("#sdedit-prompt textarea").fill(APPLE)


def fill_classify(page: Page, apple: Path, star: Path) -> None:
    give(page, "classify", apple)
    page.get_by_label("Labels").fill("red apple, star, whale, lemon")
    page.get_by_label("Caption").fill("a picture of a {}")


FILLED: dict[str, Callable[[Page, Path, Path], None]] = {
    "vary": fill_vary,
    "interpolate": fill_interpolate,
    "text_diff": fill_text_diff,
    "inpaint": fill_inpaint,
    "sdedit": fill_sdedit,
    "classify": fill_classify,
}

if __name__ == "__main__":
    main()
