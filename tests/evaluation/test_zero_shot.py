"""Zero-shot classification, against scikit-learn and by hand; the typographic attack, on pictures."""

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from unclip_jax.data import emoji_scenes
from unclip_jax.errors import UserError
from unclip_jax.evaluation import zero_shot
from unclip_jax.evaluation.intervals import wilson

NAMES = ("fox", "tent", "whale")


def test_classes_are_means_of_unit_embeddings():
    """By hand: captions of lengths 5 and 13, which do not count, in two directions each."""
    said = {"a fox": [3, 4], "fox!": [12, 5], "a tent": [-4, 3], "tent!": [0, -2]}
    seen = []

    def captions(texts):
        seen.extend(texts)
        return np.array([said[text] for text in texts], np.float64)

    classes = zero_shot.class_embeddings(captions, ["fox", "tent"], ["a {}", "{}!"])
    fox, tent = np.array([3 / 5 + 12 / 13, 4 / 5 + 5 / 13]), np.array([-4 / 5, 3 / 5 - 1])
    np.testing.assert_allclose(classes, [fox / np.hypot(*fox), tent / np.hypot(*tent)], atol=1e-12)
    assert sorted(seen) == sorted(said)


def test_accuracy_is_scikit_learns():
    rng = np.random.default_rng(0)
    similarities, labels = rng.normal(size=(200, 12)), rng.integers(12, size=200)
    similarities[np.arange(200), labels] += 1.0
    for k in (1, 5):
        result = zero_shot.accuracy(similarities, labels, k)
        assert result.value == pytest.approx(top_k_accuracy_score(labels, similarities, k=k))
        assert (result.low, result.high) == wilson(round(200 * result.value), 200)
        assert result.n == 200 and result.card["chance"] == pytest.approx(k / 12)
    each = zero_shot.class_accuracies(similarities, labels, [f"c{k}" for k in range(12)])
    for k in range(12):
        own = labels == k
        assert each[f"c{k}"].n == own.sum()
        assert each[f"c{k}"].value == pytest.approx(np.mean(similarities[own].argmax(axis=1) == k))


def test_classes_that_are_equally_similar_are_no_hit():
    similarities = np.array([[1.0, 1.0, 0.0], [0.0, 0.5, 0.1]])
    assert zero_shot.accuracy(similarities, np.array([0, 1])).value == 0.5
    each = zero_shot.class_accuracies(similarities, np.array([0, 1]), NAMES)
    assert {name: result.value for name, result in each.items()} == {"fox": 0, "tent": 1}  # no whale was shown


def test_templates_are_lines_of_a_file(tmp_path):
    (tmp_path / "good.txt").write_text("a photo of a {}.\n\n  a {} in the snow  \n")
    assert zero_shot.read_templates(tmp_path / "good.txt") == ["a photo of a {}.", "a {} in the snow"]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.txt").write_text("a photo\n")
    for name, says in (("empty", "has no templates"), ("wrong", "expected {} in it"), ("none", "cannot be read")):
        with pytest.raises(UserError, match=says):
            zero_shot.read_templates(tmp_path / f"{name}.txt")


@pytest.mark.parametrize("size", [16, 64, 256])
@pytest.mark.parametrize("text", ["pizza", "a very long name of some thing", "i"])
def test_overlay_writes_black_on_a_white_paper(size, text):
    picture = np.full((size, 2 * size, 3), 90, np.uint8)
    attacked = zero_shot.overlay(picture, text, (0.5, 0.5), 0.3)
    changed = np.any(attacked != 90, axis=-1)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    patch = attacked[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert patch.shape[0] <= round(0.3 * size) and patch.shape[1] <= 2 * size
    assert len(text) > 5 or patch.shape[0] == round(0.3 * size)
    assert abs(rows.mean() - (size - 1) / 2) <= 1 and abs(columns.mean() - (2 * size - 1) / 2) <= 1
    assert patch.min() < 200 and np.ptp(patch, axis=-1).max() == 0  # grey alone
    if size == 256:
        assert (patch[[0, -1]] == 255).all() and (patch[:, [0, -1]] == 255).all() and patch.min() < 30
    np.testing.assert_array_equal(attacked, zero_shot.overlay(picture, text, (0.5, 0.5), 0.3))
    assert (picture == 90).all()


def test_overlay_stays_in_the_picture():
    picture = np.full((64, 64, 3), 90, np.uint8)
    corner = zero_shot.overlay(picture, "fox", (1.0, 1.0), 0.25)
    assert (corner[-16:, -1] == 255).all() and (corner[-17] == 90).all()
    assert (zero_shot.overlay(picture, "fox", (0.0, 0.0), 0.25)[0, 0] == 255).all()
    for wrong in (("", (0.5, 0.5), 0.2), ("fox", (1.5, 0.5), 0.2), ("fox", (0.5, 0.5), 0.0), ("a\nb", (0.5, 0.5), 0.2)):
        with pytest.raises(UserError, match="expected"):
            zero_shot.overlay(picture, *wrong)


def test_attack_on_a_reader_and_on_one_who_looks():
    """On drawn scenes: the one reads the paper, the other sees the background; both are known in advance."""
    colours = list(emoji_scenes.colours())
    scenes = [emoji_scenes.Scene("red apple", colour) for colour in colours]
    pictures = np.stack([emoji_scenes.render(scene, 64) for scene in scenes])
    labels, written = np.arange(len(colours)), np.roll(np.arange(len(colours)), 1)
    words = [colours[k] for k in written]
    attacked = np.stack([zero_shot.overlay(p, word) for p, word in zip(pictures, words, strict=True)])
    papers = {k: zero_shot.overlay(pictures[0], colours[k])[43:53, 10:54] for k in written}

    def looks(images):
        palette = np.array(list(emoji_scenes.colours().values()), float)
        return -np.linalg.norm(images[:, 0, 0].astype(float)[:, None] - palette, axis=-1)

    def reads(images):
        seen = [[np.mean(image[43:53, 10:54] == papers[k]) for k in range(len(colours))] for image in images]
        paper = np.array([[(image[43:53, 10:54] == 255).all(axis=-1).mean() > 0.2] for image in images])
        return np.where(paper, seen, looks(images))

    for judge, expected in ((looks, (1, 1, 0)), (reads, (1, 0, 1))):
        found = zero_shot.typographic_attack(judge(pictures), judge(attacked), labels, written)
        assert tuple(found[name].value for name in ("before", "after", "follows")) == expected
        assert found["after"].n == 8 and found["after"].low < found["after"].high


def test_what_cannot_be_classified_is_refused():
    similarities, labels = np.eye(3), np.arange(3)
    for does, says in (
        (lambda: zero_shot.accuracy(similarities, labels, 3), "expected k from 1 to 2"),
        (lambda: zero_shot.accuracy(similarities, labels[:2]), "one for each"),
        (lambda: zero_shot.accuracy(similarities, labels + 1), "expected numbers of 3 classes"),
        (lambda: zero_shot.accuracy(similarities * np.nan, labels), "not finite"),
        (lambda: zero_shot.class_accuracies(similarities, labels, NAMES[:2]), "a name for each"),
        (lambda: zero_shot.typographic_attack(similarities, similarities, labels, labels), "3 pictures carry the name"),
        (lambda: zero_shot.class_embeddings(lambda texts: np.ones((len(texts), 2)), NAMES), "'fox' and 'tent' are the"),
        (lambda: zero_shot.class_embeddings(lambda texts: np.ones((len(texts), 2)), NAMES, ["a"]), "expected {} in it"),
    ):
        with pytest.raises(UserError, match=says):
            does()
