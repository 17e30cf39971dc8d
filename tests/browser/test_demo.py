"""The demo in Chromium: every tab used as a visitor uses it, on a random cascade, without a request to elsewhere."""

import io
import json
import shutil

import demo_server
import numpy as np
import pytest
from PIL import Image
from shrink import save_cascade

from unclip_jax.data.transforms import center_square

pytest.importorskip("gradio")
pytestmark = pytest.mark.browser

SECONDS = 240  # for a step, compiling included


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A demo of random models without upsamplers; fails if it wrote a traceback, or left files."""
    root, place = save_cascade(tmp_path_factory.mktemp("cascade")), tmp_path_factory.mktemp("place")
    for name in ("upsampler_256", "upsampler_1024"):
        shutil.rmtree(root / name)
    with demo_server.serve(root, place) as (process, where):
        yield where
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert errors == "" and process.returncode == 0
    assert not list(place.iterdir())


@pytest.fixture
def visit(browser, address):
    """visit(): opens the page as another visitor. Requests to elsewhere and exceptions in the page fail the test."""
    contexts, wrong = [], []

    def leaves(request):
        if not request.url.startswith((address, "data:", "blob:")):
            wrong.append(request.url)

    def open_page():
        contexts.append(browser.new_context(viewport={"width": 1300, "height": 1000}))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * SECONDS)
        page.on("request", leaves)
        page.on("pageerror", lambda error: wrong.append(error))
        page.goto(address)
        page.wait_for_selector("#draw-button")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return demo_server.save_files(tmp_path_factory.mktemp("files"), (120, 160), (90, 90))


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def give(page, name, path):
    if name in ("inpaint", "sdedit"):  # Gradio's editor takes no file before it is ready, which it does not show
        page.wait_for_selector(f"#{name}-picture canvas")
        page.wait_for_timeout(3000)
    page.locator(f"#{name}-picture input[type=file]").first.set_input_files(path)


def fetched(page, selector):
    """The picture files that are shown within an element, as they come from the demo."""
    sources = [image.get_attribute("src") for image in page.locator(f"{selector} img").all()]
    found = [Image.open(io.BytesIO(page.request.get(source).body())) for source in dict.fromkeys(sources)]
    assert found
    return found


def shown(page, name, count=4):
    """Waits until so many pictures of a tab are there, and returns them."""
    page.wait_for_function(f"document.querySelectorAll('#{name}-shown img').length === {count}")
    return fetched(page, f"#{name}-shown")


def told(image):
    return json.loads(image.text["demo"])


def test_pictures_of_a_prompt_come_one_after_another(visit):
    page = visit()
    page.evaluate(
        """() => {
            window.counts = new Set()
            const count = () => window.counts.add(document.querySelectorAll('#draw-shown img').length)
            new MutationObserver(count).observe(document.body, {childList: true, subtree: true})
        }"""
    )
    page.locator("#draw-prompt textarea").fill("a red fox")
    page.click("#draw-button")
    drawn = shown(page, "draw")
    assert 1 in page.evaluate("[...window.counts]")
    assert len({image.tobytes() for image in drawn}) == 4
    assert [told(image)["index"] for image in drawn] == [0, 1, 2, 3]
    assert all(told(image)["prompt"] == "a red fox" for image in drawn)
    page.locator("#draw-prompt textarea").fill("a blue tent")
    page.locator("#draw-prompt textarea").press("Enter")
    page.wait_for_function("document.querySelector('#draw-shown img')?.src.includes('a_blue_tent')")


def test_painted_pixels_are_drawn_and_all_others_stay(visit, files):
    page = visit()
    open_tab(page, "Inpaint")
    give(page, "inpaint", files / "wide.png")
    page.locator("#inpaint-prompt textarea").fill("a red fox")
    for _ in range(20):  # until the editor has the picture
        page.wait_for_timeout(1000)
        page.click("#inpaint-button")
        page.wait_for_selector("[data-testid=toast-body]")
        if page.locator("[data-testid=toast-body]:has-text('marks nothing of the square')").count():
            break
    page.wait_for_selector("[data-testid=toast-body]:has-text('marks nothing of the square')")
    box = page.locator("#inpaint-picture canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 8, y, steps=4)
    page.mouse.up()
    page.wait_for_timeout(500)
    page.click("#inpaint-button")
    drawn = np.stack([np.asarray(image) for image in shown(page, "inpaint")])
    size = drawn.shape[1]
    source = center_square(np.asarray(Image.open(files / "wide.png")), size, "area")
    kept = (drawn == source).all(axis=(0, 3))  # where all four equal the picture
    assert kept[[0, -1]].all() and kept[:, [0, -1]].all(), "the brush was in the middle"
    assert not kept.all() and kept.mean() > 0.4


def test_edits_are_shown_frame_by_frame(visit, files):
    page = visit()
    open_tab(page, "Interpolate")
    give(page, "interpolate-first", files / "wide.png")
    give(page, "interpolate-second", files / "square.png")
    page.wait_for_selector("#interpolate-second-picture img")
    page.click("#interpolate-button")
    frames = shown(page, "interpolate", 8)
    (animation,) = fetched(page, "#interpolate-gif")
    assert animation.format == "GIF" and animation.n_frames == 14
    for number in (1, 5, 8):
        page.locator("#interpolate-slider input[type=number]").fill(str(number))
        page.locator("#interpolate-slider input[type=number]").press("Enter")
        page.wait_for_function(f"document.querySelector('#interpolate-frame img')?.src.endsWith('_{number - 1}.png')")
        assert fetched(page, "#interpolate-frame")[0].tobytes() == frames[number - 1].tobytes()


def test_every_other_tab_answers(visit, files):
    page = visit()
    for tab, name in (("Vary", "vary"), ("Text diff", "text_diff"), ("SDEdit", "sdedit"), ("Classify", "classify")):
        open_tab(page, tab)
        give(page, name, files / "square.png")
        page.wait_for_timeout(1500)
        if name == "text_diff":
            page.get_by_label("After").fill("a red fox")
        if name == "sdedit":
            page.locator("#sdedit-prompt textarea").fill("a red fox")
        if name == "classify":
            page.get_by_label("Labels").fill("red fox, blue tent")
        page.click(f"#{name}-button")
        if name == "classify":
            page.wait_for_selector("#classify-shown:has-text('red fox'):has-text('%')")
        else:
            drawn = shown(page, name, 8 if name == "text_diff" else 4)
            assert told(drawn[0])["tab"] == name


def test_two_visitors_each_get_their_own(visit):
    asked = {"a red fox": visit(), "a blue tent": visit()}
    for prompt, page in asked.items():
        page.locator("#draw-prompt textarea").fill(prompt)
    for page in asked.values():
        page.click("#draw-button")
    for prompt, page in asked.items():
        assert {told(image)["prompt"] for image in shown(page, "draw")} == {prompt}


@pytest.mark.parametrize("prompt", ["a red " * 10, "<img src=x onerror=alert(1)> <b>bold</b>"])
def test_a_mistake_is_one_line_and_the_next_prompt_is_drawn(prompt, visit):
    page = visit()
    page.locator("#draw-prompt textarea").fill(prompt)
    page.click("#draw-button")
    toast = page.locator("[data-testid=toast-body]")
    toast.wait_for()
    assert f"the prompt '{prompt[:40]}'" in toast.inner_text() and "shorten it" in toast.inner_text()
    assert "Traceback" not in page.content() and not page.locator("[data-testid=toast-body] img, b").count()
    page.locator("#draw-prompt textarea").fill("a red fox")
    page.click("#draw-button")
    shown(page, "draw")


def test_a_file_that_is_no_picture_is_one_line(visit, files):
    page = visit()
    open_tab(page, "Vary")
    give(page, "vary", files / "none.png")
    page.wait_for_timeout(1500)
    page.click("#vary-button")
    page.wait_for_selector("[data-testid=toast-body]:has-text('the picture cannot be read')")
    assert "Traceback" not in page.content() and not page.locator("#vary-shown img").count()
