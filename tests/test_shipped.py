"""The weights that come with the package: they are what the manifest says, and what the configs would train."""

import hashlib
import json
import re
import runpy
from pathlib import Path

import chex
import numpy as np
import pytest

from unclip_jax import cli, shipped
from unclip_jax.bundle import load_bundle
from unclip_jax.cascade import Cascade
from unclip_jax.chain import UPSAMPLERS
from unclip_jax.data import emoji_scenes
from unclip_jax.evaluation import scene_scores
from unclip_jax.origin import load_origin
from unclip_jax.stages import make_stage
from unclip_jax.trials import CONFIGS, digest

MODELS = shipped.manifest()
PARTS = ("value", "low", "high")
CASCADE = {"clip", "prior", "decoder", *UPSAMPLERS}
MAKE = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "weights" / "make.py"))


def test_there_is_a_cascade_and_it_is_small():
    assert {"clip", "prior", "decoder"} <= set(MODELS)
    assert sum(known["bytes"] for name, known in MODELS.items() if name in CASCADE) <= 12e6
    assert sum(known["bytes"] for known in MODELS.values()) <= 24e6


@pytest.mark.parametrize("name", MODELS)
def test_files_are_those_of_the_manifest(name):
    files = {path.name: path.read_bytes() for path in (shipped.FOLDER / name).iterdir()}
    assert {file: hashlib.sha256(content).hexdigest() for file, content in files.items()} == MODELS[name]["sha256"]
    assert sum(map(len, files.values())) == MODELS[name]["bytes"]


@pytest.mark.parametrize("name", MODELS)
def test_experiments_find_what_their_configs_would_train(name):
    config = cli.load_config(f"configs/{CONFIGS.get(name, name)}.py:shipped").copy_and_resolve_references()
    bundle = load_bundle(shipped.FOLDER / name)
    assert json.dumps(bundle.config.to_dict()) == json.dumps(config.to_dict()), "without folders of the machine"
    if "clip" in config:
        with config.unlocked():
            config.clip.bundle = "shipped:clip"
        assert bundle.clip_identity == load_bundle(shipped.FOLDER / "clip").identity
    assert shipped.find(digest(config)) == shipped.FOLDER / name
    with config.unlocked():
        config.optim.learning_rate *= 2
    assert shipped.find(digest(config)) is None


def test_the_card_says_what_was_measured():
    text = (shipped.FOLDER / "README.md").read_text()
    measured = MODELS["decoder"]["measured"]
    found = [result[part] for kind in measured.values() for result in kind["all"].values() for part in PARTS]
    values = {f"{value:.3f}" for value in found}
    assert len(values) > 5 and set(re.findall(r"\b[01]\.\d{3}\b", text)) <= values


def test_glide_begins_with_what_the_decoder_does_without_its_embedding(tmp_path):
    config = cli.load_config("configs/glide.py:shipped").copy_and_resolve_references()
    MAKE["store_glide_of_decoder"](tmp_path / "begun_with", config)
    with config.unlocked():
        config.init.bundle = str(tmp_path / "begun_with")
    glide, decoder = make_stage(config), load_bundle(shipped.FOLDER / "decoder")
    params = load_origin(config, glide, "").params  # as a run of this config loads it
    tokens, length = np.arange(36)[None] % 7, np.array([5])
    own = make_stage(decoder.config)._conditioner()
    without = np.zeros((1, 128)), np.array([False])
    expected = own.apply({"params": decoder.params["conditioner"]}, tokens, length, *without)
    found = glide._conditioner().apply({"params": params["conditioner"]}, tokens, length)
    np.testing.assert_allclose(found.emb, expected.emb, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.context, expected.context[:, : found.context.shape[1]], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(params["unet"], decoder.params["unet"])


@pytest.mark.slow
def test_the_cascade_draws_as_well_as_the_manifest_says():
    """The first pictures of those that were measured."""
    captions = [text for _, text in emoji_scenes.scenes("single", "test")]
    images = Cascade.load().generate(captions, 0)["images"][-1]
    found = {result.name: result.value for result in scene_scores.score(images, captions)}
    for name, known in MODELS["decoder"]["measured"]["single"]["first"].items():
        np.testing.assert_allclose(found[name], known["value"], atol=0.04)
