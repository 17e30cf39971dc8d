"""Studies by people: what the page shows and hides, and what the command makes of votes."""

import csv
import io
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from unclip_jax import drawing, pictures, study
from unclip_jax.data.transforms import area_resize
from unclip_jax.errors import UserError
from unclip_jax.evaluation.study_page import choose

CAPTIONS = ["a red apple", 'a "sign" that says </script><script>alert(1)</script>', "un œuf & a 🍳"]


def drawn(arm, caption, number, side=8):
    """A picture that tells by its first pixel of which arm, caption and number it is."""
    image = np.random.default_rng([arm, caption, number]).integers(0, 256, (side, side, 3)).astype(np.uint8)
    image[0, 0] = arm, caption, number
    return image


def save_arms(root, each=2, arms=2, captions=CAPTIONS, side=8):
    """Folders arm0, arm1 … of PNG files as `sample --prompts --format png` names them; the last one of a tar."""
    for arm in range(arms):
        files = {}
        for row, draw in np.ndindex(len(captions), each):
            stored = {"prompt": captions[row], "settings": {"bundle": f"secret{arm}"}}
            files[f"{row:08}_{draw:03}.png"] = pictures.png(drawn(arm, row, draw, side), stored)
        folder = root / f"arm{arm}"
        folder.mkdir(parents=True)
        if arm == arms - 1:
            files = {"000000.tar": drawing._tar(files)}
        for name, data in files.items():
            (folder / name).write_bytes(data)
    return [f"secret{arm}={root / f'arm{arm}'}" for arm in range(arms)]


def make(arms, out, question="caption", *options):
    flags = [word for arm in arms for word in ("--arm", arm)]
    assert study.main(["study", "make", "--question", question, *flags, "--out", str(out), *map(str, options)]) == 0
    return json.loads((out / "key.json").read_text())


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def page_of(out):
    return json.loads(re.search(r'id="study">(.*)</script>\n', (out / "page" / "index.html").read_text())[1])


def test_pictures_are_of_the_arms_that_the_key_says(tmp_path):
    key = make(save_arms(tmp_path / "in"), tmp_path / "out")
    comparisons, captions = key["comparisons"], page_of(tmp_path / "out")["captions"]
    assert len(comparisons) == 6 and len({(c["caption"], c["number"]) for c in comparisons}) == 6
    for i, comparison in enumerate(comparisons):
        assert captions[i] == comparison["caption"]
        for side in ("left", "right"):
            with Image.open(tmp_path / "out" / "page" / "pictures" / f"{i:05}_{side}.png") as file:
                arm, row = int(comparison[side][-1]), CAPTIONS.index(comparison["caption"])
                np.testing.assert_array_equal(np.asarray(file), drawn(arm, row, comparison["number"]))
                assert file.info == {}, "a PNG may hold the bundle's name"


def test_page_is_blind_and_needs_nothing_else(tmp_path):
    make(save_arms(tmp_path / "in"), tmp_path / "out")
    files = files_of(tmp_path / "out" / "page")
    assert all(b"secret" not in data and "secret" not in name for name, data in files.items())
    names = {f"{i:05}_{side}.png" for i in range(6) for side in ("left", "right")} | {"index.html"}
    assert set(files) == names
    text = files["index.html"].decode()
    assert not re.search(r"https?:|//\w+\.|@import|url\(|<link[^>]*stylesheet|<script[^>]*src", text)
    assert text.count("</script>") == 2, "a caption may not end the script"


def test_a_seed_is_a_study(tmp_path):
    arms = save_arms(tmp_path / "in")
    keys = [make(arms, tmp_path / name, "caption", "--seed", name[0]) for name in ("3", "3 again", "4")]
    assert keys[0]["comparisons"] != keys[2]["comparisons"] and keys[0]["id"] != keys[2]["id"]
    assert files_of(tmp_path / "3") == files_of(tmp_path / "3 again")


def test_photorealism_shows_no_caption(tmp_path):
    make(save_arms(tmp_path / "in"), tmp_path / "out", "photorealism")
    assert page_of(tmp_path / "out")["captions"] == [None] * 6


def test_diversity_shows_sixteen_of_a_caption(tmp_path):
    key = make(save_arms(tmp_path / "in", each=33, captions=CAPTIONS[:1], side=136), tmp_path / "out", "diversity")
    assert sorted(c["number"] for c in key["comparisons"]) == [0, 1]
    for i, comparison in enumerate(key["comparisons"]):
        with Image.open(tmp_path / "out" / "page" / "pictures" / f"{i:05}_left.png") as file:
            sheet = np.asarray(file)
        assert sheet.shape == (532, 532, 3)
        for k in range(16):
            y, x = 4 + k // 4 * 132, 4 + k % 4 * 132
            there = drawn(int(comparison["left"][-1]), 0, 16 * comparison["number"] + k, 136)
            np.testing.assert_array_equal(sheet[y : y + 128, x : x + 128], area_resize(there, 128))


def test_pairs_and_sides_are_balanced():
    captions = {arm: [f"caption {i}" for i in range(400) for _ in range(2)] for arm in "abc"}
    chosen = choose(captions, 1, 1000, 0)
    pairs = Counter(frozenset((c.left, c.right)) for c in chosen)
    assert sorted(pairs.values()) == [333, 333, 334]
    sides = Counter((c.left, c.right) for c in chosen)
    assert len(sides) == 6 and all(abs(sides[a, b] - sides[b, a]) <= 1 for a, b in sides)
    for pair in pairs:  # no caption twice before all came once
        assert len({c.caption for c in chosen if {c.left, c.right} == pair}) == pairs[pair]
    # Order and sides follow no pattern: who always votes left says nothing about arms, and who stops early is of use.
    assert all(20 < sum({c.left, c.right} == pair for c in chosen[:100]) < 50 for pair in pairs)
    halves = [sum(c.left < c.right for c in half) for half in (chosen[:500], chosen[500:])]
    assert all(abs(half - 250) < 40 for half in halves)
    assert len(choose(captions, 1, 10_000, 0)) == len(set(choose(captions, 1, 10_000, 0))) == 2400


def test_pictures_come_in_the_smallest_arms_size(tmp_path):
    arms = [*save_arms(tmp_path / "small"), *save_arms(tmp_path / "large", side=16)[:1]]
    key = make([arms[1], f"large={arms[2].partition('=')[2]}"], tmp_path / "out")
    assert key["side"] == 8
    for path in (tmp_path / "out" / "page" / "pictures").iterdir():
        with Image.open(path) as file:
            assert file.size == (8, 8)


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (lambda root: None, ["--arm", "{0}", "--arm", "b"], "NAME=FOLDER"),
        (lambda root: None, ["--arm", "{0}", "--arm", "{0}"], "each name once"),
        (lambda root: None, ["--arm", "{0}"], "two or more"),
        (lambda root: None, ["--arm", "{0}", "--arm", "b=nowhere"], "nowhere is no folder"),
        (lambda root: None, ["--comparisons", "0"], "--comparisons: '0': expected a whole number from 1"),
        (lambda root: None, ["--question", "diversity"], "has 2 pictures of 'a red apple', and a set has 16"),
        (lambda root: None, ["votes.csv"], "make takes no files"),
        (lambda root: save_arms(root / "x", captions=CAPTIONS[:2]), ["--arm", "x={1}/x/arm0"], "1 captions differ"),
        (lambda root: (root / "empty").mkdir(), ["--arm", "x={1}/empty"], "no pictures in"),
        (lambda root: save_arms(root / "x", captions=[""]), ["--arm", "x={1}/x/arm0"], "2 of its 2 .* no caption"),
        (lambda root: make(save_arms(root / "y"), root / "out"), [], "holds a study already"),
    ],
)
def test_what_cannot_be_asked_is_one_line(tmp_path, change, options, says):
    arms = save_arms(tmp_path / "in")
    change(tmp_path)
    options = [word.format(arms[0], tmp_path) for word in options]
    if sum(word == "--arm" for word in options) < 2 and "two or more" not in says:
        options += [word for arm in arms for word in ("--arm", arm)]
    with pytest.raises(UserError, match=says) as caught:
        study.main(["study", "make", "--question", "caption", "--out", str(tmp_path / "out"), *options])
    assert "\n" not in str(caught.value)


def save_votes(path, key, words, rater="x1"):
    """A file as the page gives it."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(study.COLUMNS)
        writer.writerows([key["id"], rater, i, word] for i, word in enumerate(words))
    return str(path)


def for_arm(key, arm, words):
    """Votes by words of which "win" and "loss" are the arm's."""
    other = {"win": {"left": "left", "right": "right"}, "loss": {"left": "right", "right": "left"}}
    sides = ["left" if comparison["left"] == arm else "right" for comparison in key["comparisons"]]
    return [other[word][side] if word in other else word for word, side in zip(words, sides, strict=False)]


@pytest.fixture
def asked(tmp_path):
    """The key of a study of two arms, 20 comparisons, and a folder for votes on it."""
    return make(save_arms(tmp_path / "in", each=10, captions=CAPTIONS[:2]), tmp_path / "out"), tmp_path


def score(capsys, folder, *names, options=("--json",)):
    capsys.readouterr()
    assert study.main(["study", "score", *names, "--key", str(folder / "out" / "key.json"), *options]) == 0
    return capsys.readouterr()


def test_votes_become_win_rates_and_elo(asked, capsys):
    key, folder = asked
    words = 12 * ["win"] + 4 * ["loss"] + 2 * ["tie"] + 2 * ["not sure"]
    first = save_votes(folder / "a.csv", key, for_arm(key, "secret0", words))
    second = save_votes(folder / "b.csv", key, for_arm(key, "secret0", words[:10]), "x2")
    rate, *elo = (json.loads(line) for line in score(capsys, folder, first, second).out.splitlines())
    assert rate["value"] == 23 / 28 and rate["n"] == 28 and rate["card"]["not sure"] == 2
    assert rate["card"]["question"] == "caption" and rate["card"]["study"] == key["id"]
    assert [result["name"] for result in elo] == ["Elo of secret0", "Elo of secret1"]
    assert elo[0]["value"] - elo[1]["value"] == pytest.approx(400 * np.log10(23 / 5), abs=1e-6)
    text = score(capsys, folder, first, options=()).out
    assert "win rate of secret0 over secret1 0.7222 [" in text and "n = 18, ± 0.207 normal; 2 ties, 2 not sure" in text
    assert "Only differences of Elo count" in text and "100 more win 64% of the time" in text


def test_infinite_elo_is_one_line_beside_the_win_rates(asked, capsys):
    key, folder = asked
    votes = save_votes(folder / "a.csv", key, for_arm(key, "secret1", 20 * ["win"]))
    said = score(capsys, folder, votes)
    assert json.loads(said.out)["value"] == 0
    assert said.err == "no Elo scores: secret1 never lost to secret0, and would be infinitely better\n"


def test_infinite_ends_are_null_in_json(asked, capsys):
    key, folder = asked
    votes = save_votes(folder / "a.csv", key, for_arm(key, "secret1", 19 * ["win"] + ["loss"]))
    *_, last = (json.loads(line) for line in score(capsys, folder, votes).out.splitlines())
    assert last["low"] is last["high"] is None and last["value"] > 0


@pytest.mark.parametrize(
    ("words", "change", "says"),
    [
        (["left"], ("study,rater", "rater,study"), "no file of votes"),
        (["left"], ("{id}", "0123"), "line 2: a vote of study 0123"),
        (["left", "maybe"], ("", ""), "line 3: comparison 1 of the study's 20, or the vote 'maybe', is unknown"),
        (21 * ["left"], ("", ""), "line 22: comparison 20"),
        (["left"], (",0,", ",x,"), "line 2: comparison x"),
        (["left"], (",0,", f",{'9' * 5000},"), "line 2: comparison 9"),
        (["left"], (",0,", f",{'9' * 200_000},"), "a.csv cannot be read"),
        (["left", "left"], (",1,", ",0,"), "line 3: .*a.csv has this vote already"),
        (["not sure"], ("", ""), "no votes to count among 1"),
        ([], ("", ""), "no votes to count among 0"),
    ],
)
def test_votes_that_cannot_be_counted_are_one_line(asked, words, change, says):
    key, folder = asked
    votes = save_votes(folder / "a.csv", key, words)
    before, after = change
    text = (folder / "a.csv").read_text()
    (folder / "a.csv").write_text(text.replace(before.format(id=key["id"]), after) if before else text)
    with pytest.raises(UserError, match=says) as caught:
        study.main(["study", "score", votes, "--key", str(folder / "out" / "key.json")])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changed", [
    {"arms": 5}, {"arms": {}}, {"comparisons": {"0": 1}}, {"comparisons": [1]}, {"comparisons": None},
    {"comparisons": [{"left": "secret0", "right": "another"}]}, {"comparisons": [{"left": 1, "right": 2}]},
])  # fmt: skip
def test_keys_that_were_changed_are_one_line(asked, changed):
    key, folder = asked
    votes = save_votes(folder / "a.csv", key, ["left"])
    (folder / "changed.json").write_text(json.dumps(key | changed))
    with pytest.raises(UserError, match=r"changed\.json is no key of a study"):
        study.main(["study", "score", votes, "--key", str(folder / "changed.json")])


def test_a_persons_file_counts_once(asked):
    key, folder = asked
    early, late = (save_votes(folder / f"{n}.csv", key, n * ["left"]) for n in (3, 5))
    with pytest.raises(UserError, match=r"5.csv, line 2: .*3.csv has this vote already: give only the last file"):
        study.main(["study", "score", early, late, "--key", str(folder / "out" / "key.json")])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["score", "a.csv"], "score needs --key"),
        (["score", "--key", "k"], "score needs files of votes"),
        (["score", "a.csv", "--key", "{0}/none.json"], "cannot be read"),
        (["score", "a.csv", "--key", "{0}/bad.json"], "is no key of a study"),
        (["score", "{0}/none.csv", "--key", "{0}/out/key.json"], "none.csv cannot be read"),
        (["make", "--question", "caption"], "make needs --arm"),
    ],
)
def test_what_is_missing_is_one_line(asked, arguments, says):
    _, folder = asked
    (folder / "bad.json").write_text('{"id": 1}')
    with pytest.raises(UserError, match=says):
        study.main(["study", *(word.format(folder) for word in arguments)])


def test_spreadsheets_may_add_a_byte_order_mark(asked, capsys):
    key, folder = asked
    votes = save_votes(folder / "a.csv", key, ["left", "right", "tie"])
    data = (folder / "a.csv").read_bytes()
    (folder / "a.csv").write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
    assert json.loads(score(capsys, folder, votes).out.splitlines()[0])["n"] == 3
    assert len(list(csv.reader(io.StringIO(data.decode())))) == 4
