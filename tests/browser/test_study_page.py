"""The page of a study in Chromium: voted on from the first pair to the last, and its file of votes counted."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from unclip_jax import pictures, study

pytestmark = pytest.mark.browser

PAIRS = 8
CAPTIONS = [f"caption {i} <b>& 'so on'</b>" for i in range(PAIRS)]
SHADES = {"light": 200, "dark": 50}  # arm → colour of its first picture; each further one is lighter by 1


@pytest.fixture
def made(tmp_path):
    """The folder of a study of two arms."""
    for arm, shade in SHADES.items():
        for i, caption in enumerate(CAPTIONS):
            image = np.full((32, 32, 3), shade + i, np.uint8)
            pictures.save_png(tmp_path / arm / f"{i}.png", image, {"prompt": caption})
    arms = [word for arm in SHADES for word in ("--arm", f"{arm}={tmp_path / arm}")]
    assert study.main(["study", "make", "--question", "caption", *arms, "--out", str(tmp_path / "study")]) == 0
    return tmp_path / "study"


@pytest.fixture
def visit(browser, made):
    """visit(): opens the study's page in a new tab, without a network; an exception in any tab fails the test."""
    context = browser.new_context(offline=True)
    wrong = []

    def open_tab():
        tab = context.new_page()
        tab.on("pageerror", lambda error: wrong.append(error))
        tab.goto((made / "page" / "index.html").as_uri())
        return tab

    yield open_tab
    context.close()
    assert wrong == []


def wait(tab, number):
    """Waits until the pair of this number, from 0, is there to be voted on."""
    tab.wait_for_function(f"ready && state.votes.length === {number}")
    assert tab.inner_text("#count") == f"{number + 1} of {PAIRS}"


def prefer(tab, made, number, arm, by_key=False):
    """Votes for an arm where the screen shows it, by a button or by a key."""
    wait(tab, number)
    shown = json.loads((made / "key.json").read_text())["comparisons"][number]
    assert tab.inner_text("#caption") == shown["caption"]
    for side in ("left", "right"):
        screen = np.asarray(Image.open(io.BytesIO(tab.locator(f"#{side}").screenshot())).convert("RGB"))
        assert min(screen.shape[:2]) > 300, "too small to be judged"
        assert abs(np.median(screen) - SHADES[shown[side]] - CAPTIONS.index(shown["caption"])) <= 1
    side = "left" if shown["left"] == arm else "right"
    if by_key:
        tab.keyboard.press({"left": "ArrowLeft", "right": "ArrowRight"}[side])
    else:
        tab.click(f"button[data-vote={side}]")


def download(tab, folder):
    with tab.expect_download() as waiting:
        tab.click("#download")
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def test_a_study_is_voted_through_and_counted(visit, made, tmp_path, capsys):
    tab = visit()
    wait(tab, 0)
    assert tab.inner_text("#question") == "Which picture matches the caption better?"
    assert tab.is_disabled("#undo") and tab.is_disabled("#download")
    prefer(tab, made, 0, "light")
    prefer(tab, made, 1, "light", by_key=True)
    prefer(tab, made, 2, "dark")  # by mistake
    wait(tab, 3)
    tab.keyboard.press("u")
    prefer(tab, made, 2, "dark")  # again
    wait(tab, 3)
    tab.click("#undo")
    prefer(tab, made, 2, "light")
    wait(tab, 3)
    early = download(tab, tmp_path)
    tab.reload()
    prefer(tab, made, 3, "dark", by_key=True)
    wait(tab, 4)
    tab.close()
    tab = visit()
    wait(tab, 4)
    tab.keyboard.press("t")
    wait(tab, 5)
    tab.click("button:has-text('Tie')")
    wait(tab, 6)
    tab.keyboard.press("n")
    wait(tab, 7)
    tab.click("button:has-text('Not sure')")
    tab.wait_for_selector("#answers", state="hidden")
    assert tab.inner_text("#count") == "8 of 8 done" and "download" in tab.inner_text("#question")
    tab.keyboard.press("ArrowLeft")  # there is nothing left to vote on

    assert [row["vote"] for row in csv.DictReader(early.read_text().splitlines())][2:] in (["left"], ["right"])
    votes = download(tab, tmp_path)
    capsys.readouterr()
    assert study.main(["study", "score", str(votes), "--key", str(made / "key.json"), "--json"]) == 0
    rate, *elo = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert rate["name"] == "win rate of light over dark" and rate["value"] == 4 / 6 and rate["n"] == 6
    assert rate["card"]["ties"] == 2 and rate["card"]["not sure"] == 2
    assert elo[0]["value"] - elo[1]["value"] == pytest.approx(400 * np.log10(2))
    assert elo[0]["low"] < elo[0]["value"] < elo[0]["high"]


def test_a_held_key_votes_once_and_two_tabs_share_votes(visit, made):
    one, other = visit(), visit()
    wait(one, 0)
    one.keyboard.down("ArrowLeft")
    wait(one, 1)
    one.keyboard.down("ArrowLeft")  # as the keyboard repeats it
    wait(other, 1)
    other.keyboard.press("n")
    wait(one, 2)
    assert one.evaluate("state.votes") == ["left", "not sure"]


def test_missing_pictures_are_said(visit, made):
    tab = visit()
    wait(tab, 0)
    (made / "page" / "pictures" / "00002_left.png").unlink()
    tab.keyboard.press("n")
    wait(tab, 1)
    tab.keyboard.press("n")
    tab.wait_for_selector("#note:has-text('A picture is missing')")
    tab.keyboard.press("ArrowLeft")
    assert tab.evaluate("state.votes.length") == 2


def test_people_cannot_see_which_arm_is_which(visit, made):
    tab = visit()
    wait(tab, 0)
    assert not any(arm in tab.content() or arm in tab.evaluate("JSON.stringify(localStorage)") for arm in SHADES)
