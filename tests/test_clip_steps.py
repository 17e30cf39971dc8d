"""Steps of `data build` by a random CLIP, against embeddings of one picture at a time."""

import numpy as np
import pytest
from shrink import random_params, save_pictures, small_config, tokenizer_bytes

from unclip_jax.bundle import save_bundle
from unclip_jax.clip_steps import ClipSteps
from unclip_jax.data import filtering
from unclip_jax.data.cleaning import Candidate
from unclip_jax.errors import UserError
from unclip_jax.evaluation import features
from unclip_jax.evaluation.probes import Probe
from unclip_jax.stages import make_stage

PICTURES = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two CLIPs, and a probe and a filter of the first."""
    root, config = tmp_path_factory.mktemp("steps"), small_config("clip")
    for name, seed in (("clip", 0), ("other", 1)):
        save_bundle(root / name, "clip", config, random_params(make_stage(config), seed), tokenizer_bytes(), "", {})
    (root / "empty").mkdir()
    noised = small_config("clip_noised")
    save_bundle(root / "noised", "clip", noised, random_params(make_stage(noised)), tokenizer_bytes(), "", {})
    clip, rng = features.clip(root / "clip"), np.random.default_rng(0)
    width = clip.captions(["a"]).shape[1]
    Probe(rng.normal(size=width), 0.5, clip.pictures.card).save(root / "probe.npz")
    rows = filtering.pooled(clip.pictures(np.concatenate([filtering.crops(p) for p in pictures()]))["image"])
    filtering.fit(rows[::2], rows[1::2], clip.pictures.card).save(root / "filter.npz")
    return root


def pictures():
    """Of several sizes and shapes."""
    rng = np.random.default_rng(1)
    sizes = [(40 + 7 * k, 90 - 5 * k, 3) for k in range(PICTURES)]
    return [np.clip(rng.normal(rng.integers(0, 256, 3), 60, size), 0, 255).astype(np.uint8) for size in sizes]


def candidates(steps):
    made = []
    for k, picture in enumerate(pictures()):
        captions = [f"picture {k}", "another caption", f"{k * k}"][: 1 + k % 3]
        made.append(Candidate(k, str(k), captions=captions, chosen=list(range(len(captions)))))
        made[-1].views = steps.views(picture)
    return made


def applied(place, **steps):
    steps = ClipSteps(str(place / "clip"), **steps)
    steps.check()
    steps.load()
    found = candidates(steps)
    steps.apply(found)
    assert all(candidate.views is None for candidate in found)
    return found


def test_similarity_chooses_captions(place):
    clip = features.clip(place / "clip")
    cosines = []
    for k, picture in enumerate(pictures()):
        image = clip.pictures(picture[None])["image"][0]
        captions = [f"picture {k}", "another caption", f"{k * k}"][: 1 + k % 3]
        cosines.append([float(clip.captions([text])[0] @ image) for text in captions])
    values = np.sort(np.concatenate(cosines))
    least = float(values[len(values) // 2 - 1 : len(values) // 2 + 1].mean())
    found = applied(place, min_similarity=least)
    assert [c.chosen for c in found] == [[j for j, value in enumerate(row) if value >= least] for row in cosines]
    assert [c.dropped for c in found] == ["" if c.chosen else "min-similarity" for c in found]
    assert {c.dropped for c in found} == {"", "min-similarity"}
    assert any(0 < len(c.chosen) < len(c.captions) for c in found)


def test_probe_and_filter_drop_pictures(place):
    clip = features.clip(place / "clip").pictures
    probe, svm = Probe.load(place / "probe.npz"), filtering.Filter.load(place / "filter.npz")
    ratings = [float(probe(clip(p[None])["image"], clip.card)[0]) for p in pictures()]
    least = float(np.sort(ratings)[PICTURES // 3 - 1 : PICTURES // 3 + 1].mean())
    found = [
        bool(svm.scores(filtering.pooled(clip(filtering.crops(p))["image"]), clip.card)[0] >= 0) for p in pictures()
    ]
    expected = [
        "min-rating" if rating < least else "filter" if there else ""
        for rating, there in zip(ratings, found, strict=True)
    ]
    assert set(expected) == {"min-rating", "filter", ""}
    steps = dict(probe=str(place / "probe.npz"), min_rating=least, filters=(str(place / "filter.npz"),))
    assert [c.dropped for c in applied(place, **steps)] == expected


def test_what_was_made_by_another_clip_is_refused(place):
    for steps in (dict(probe=str(place / "probe.npz"), min_rating=0.0), dict(filters=(str(place / "filter.npz"),))):
        assert ClipSteps(str(place / "clip"), **steps).check()["steps"]
        with pytest.raises(UserError, match=r"\.npz is of CLIP \w+, --clip .*other is \w+: use its"):
            ClipSteps(str(place / "other"), **steps).check()
    with pytest.raises(UserError, match="no filter at"):
        ClipSteps(str(place / "clip"), filters=("nowhere.npz",)).check()
    with pytest.raises(UserError, match="is not a bundle"):
        ClipSteps(str(place / "empty"), 0.1).check()
    with pytest.raises(UserError, match="noised is no CLIP that embeds pictures"):
        ClipSteps(str(place / "noised"), 0.1).check()


def test_a_build_leaves_out_what_the_clip_does(place, tmp_path):
    pytest.importorskip("apache_beam", reason="needs the extra [build]")
    from unclip_jax import build_dataset

    folder = save_pictures(tmp_path / "pictures", 10)
    words = [f"--source=folder:{folder}", f"--out={tmp_path}", f"--clip={place / 'clip'}", "--min-similarity"]
    assert build_dataset.main(["build", *words, "-1", "--name=all"]) == 0
    with pytest.raises(UserError, match="no record is kept"):
        build_dataset.main(["build", *words, "1", "--name=none"])
