"""The demo in Chromium: every tab used as a visitor uses it, on a random cascade, without a request to elsewhere."""

import io
import json
import re
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
        _, errors = process.communicate(timeout=SECONDS)
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
    """Waits until so many pictures of a tab are drawn, and returns them."""
    page.wait_for_function(
        """([name, count]) => {
            const images = [...document.querySelectorAll(`#${name}-shown img`)]
            return images.length === count && !images.some(image => image.src.includes('preview'))
        }""",
        arg=[name, count],
    )
    return fetched(page, f"#{name}-shown")


def told(image):
    return json.loads(image.text["demo"])


def noted(page, name):
    """Has the page note the addresses of all pictures that a tab shows from now on: read them by `window.noted`."""
    page.evaluate(
        """name => {
            window.noted = []
            const note = () => window.noted.push([...document.querySelectorAll(`#${name}-shown img`)].map(i => i.src))
            const changes = {childList: true, subtree: true, attributes: true, attributeFilter: ['src']}
            new MutationObserver(note).observe(document.body, changes)
        }""",
        name,
    )


def previewed(page):
    """Addresses of the previews that a page has noted, and how many pictures were drawn when the first was shown."""
    seen = page.evaluate("window.noted")
    previews = {source for sources in seen for source in sources if "preview" in source}
    first = next(sources for sources in seen if previews & set(sources))
    return previews, len([source for source in first if "preview" not in source])


def test_pictures_of_a_prompt_come_one_after_another(visit):
    page = visit()
    noted(page, "draw")
    page.locator("#draw-prompt textarea").fill("a red fox")
    page.click("#draw-button")
    drawn = shown(page, "draw")
    assert len({image.tobytes() for image in drawn}) == 4
    assert [told(image)["index"] for image in drawn] == [0, 1, 2, 3]
    assert all(told(image)["prompt"] == "a red fox" for image in drawn)
    previews, before = previewed(page)
    assert before == 0, "they are shown while nothing is drawn yet"
    looks = [np.asarray(Image.open(io.BytesIO(page.request.get(source).body()))) for source in previews]
    assert {look.shape for look in looks} == {np.asarray(drawn[0]).shape}
    assert len({look.tobytes() for look in looks}) > 1, "x0 changes from step to step"
    page.locator("#draw-prompt textarea").fill("a blue tent")
    page.locator("#draw-prompt textarea").press("Enter")
    page.wait_for_function("document.querySelector('#draw-shown img')?.src.includes('a_blue_tent')")


def test_count_seed_and_scale_are_heeded(visit):
    page = visit()
    page.locator("#draw-prompt textarea").fill("a red fox")
    tab = page.locator("#tab-draw")
    tab.get_by_text("How it is drawn").click()
    for label, value in (("Pictures", 2), ("Seed", 5), ("Guidance", 3)):
        field = tab.locator(f"input[aria-label='number input for {label}'], input[aria-label='{label}']")
        field.fill(str(value))
        field.press("Tab")
    page.click("#draw-button")
    found = [told(image) for image in shown(page, "draw", 2)]
    assert [(one["count"], one["seed"], one["guidance"]) for one in found] == 2 * [(2, 5, 3)]
    assert found[0]["sampler"] == "ddim" and found[0]["steps"] == "3", "those of the trained config"


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
    labels = page.locator("#interpolate-shown .caption-label").all_inner_texts()
    assert [float(label) for label in labels] == [round(share, 2) for share in np.linspace(0, 1, 8)]
    (animation,) = fetched(page, "#interpolate-gif")
    assert animation.format == "GIF" and animation.n_frames == 14
    with page.expect_download() as waiting:
        page.locator("#interpolate-gif").get_by_label("Download").click()
    with Image.open(waiting.value.path()) as kept:
        assert (kept.format, kept.n_frames) == ("GIF", 14)
    for number in (1, 5, 8):
        page.locator("#interpolate-slider input[type=number]").fill(str(number))
        page.locator("#interpolate-slider input[type=number]").press("Enter")
        page.wait_for_function(f"document.querySelector('#interpolate-frame img')?.src.endsWith('_{number - 1}.png')")
        assert fetched(page, "#interpolate-frame")[0].tobytes() == frames[number - 1].tobytes()


def test_a_dropped_picture_is_varied(visit, files):
    page = visit()
    open_tab(page, "Vary")
    noted(page, "vary")
    dropped = page.evaluate_handle(
        """bytes => {
            const data = new DataTransfer()
            data.items.add(new File([new Uint8Array(bytes)], 'square.png', {type: 'image/png'}))
            return data
        }""",
        list((files / "square.png").read_bytes()),
    )
    page.locator("#vary-picture button:has(input[type=file])").dispatch_event("drop", {"dataTransfer": dropped})
    page.wait_for_selector("#vary-picture img")
    field = page.locator("#tab-vary").get_by_label("number input for Eta")
    field.fill("0")
    field.press("Tab")
    page.click("#vary-button")
    drawn = shown(page, "vary")
    assert [(told(image)["tab"], told(image)["eta"]) for image in drawn] == 4 * [("vary", 0)]
    assert len({image.tobytes() for image in drawn}) == 1, "without noise all are the same"
    assert previewed(page)[0]


def test_a_text_diff_starts_at_the_picture_and_ends_at_theta(visit, files):
    page = visit()
    open_tab(page, "Text diff")
    give(page, "text_diff", files / "square.png")
    page.wait_for_selector("#text_diff-picture img")
    page.get_by_label("Before").fill("a blue tent")
    page.get_by_label("After").fill("a red fox")
    page.click("#text_diff-button")
    drawn = shown(page, "text_diff", 8)
    about = told(drawn[0])
    assert (about["before"], about["after"], about["theta"]) == ("a blue tent", "a red fox", 0.4)
    labels = page.locator("#text_diff-shown .caption-label").all_inner_texts()
    assert (labels[0], labels[-1]) == ("theta 0.00", "theta 0.40")
    page.get_by_label("After").fill("a blue tent")
    page.click("#text_diff-button")
    page.wait_for_selector("[data-testid=toast-body]:has-text('are the same to this CLIP')")


def test_a_sketch_is_drawn_over_and_labels_have_probabilities(visit, files):
    page = visit()
    open_tab(page, "SDEdit")
    give(page, "sdedit", files / "square.png")
    page.wait_for_timeout(3000)
    page.locator("#sdedit-prompt textarea").fill("a red fox")
    page.click("#sdedit-button")
    drawn = shown(page, "sdedit")
    assert [(told(image)["tab"], told(image)["start"]) for image in drawn] == 4 * [("sdedit", 0.5)]
    assert len({image.tobytes() for image in drawn}) == 4
    open_tab(page, "Classify")
    give(page, "classify", files / "square.png")
    page.wait_for_selector("#classify-picture img")
    page.get_by_label("Labels").fill("red fox, blue tent")
    page.click("#classify-button")
    page.wait_for_selector("#classify-shown:has-text('red fox'):has-text('blue tent'):has-text('%')")
    shares = re.findall(r"(\d+)%", page.inner_text("#classify-shown"))
    assert abs(sum(map(int, shares)) - 100) <= 1


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
