"""The weights that come with the package: they are what the manifest says, and what the configs would train."""

import hashlib
import importlib
import json
import re
from pathlib import Path

import chex
import numpy as np
import pytest

from unclip_jax import cli, shipped
from unclip_jax.bundle import load_bundle
from unclip_jax.cascade import Cascade
from unclip_jax.chain import UPSAMPLERS
from unclip_jax.data import emoji_scenes
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.evaluation import scene_scores
from unclip_jax.stages import make_stage
from unclip_jax.trials import CONFIGS, digest

MODELS = shipped.manifest()
PARTS = ("value", "low", "high")
CASCADE = {"clip", "prior", "decoder", *UPSAMPLERS}
ROOT = Path(__file__).parents[1]


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
    kinds = [kind for known in MODELS.values() for kind in known.get("measured", {}).values()]
    found = [result[part] for kind in kinds for result in kind["all"].values() for part in PARTS]
    found += [value for known in MODELS.values() for value in known.get("held_out", {}).values()]
    values = {f"{value:.3f}" for value in found}
    assert len(values) > 5 and set(re.findall(r"\b[01]\.\d{3}\b", text)) <= values


@pytest.mark.slow
def test_the_text_path_that_glide_begins_with_learns_the_decoders_conditions(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments" / "weights")
    glide_start = importlib.import_module("glide_start")
    for name, value in {"STEPS": 60, "WARMUP": 5, "BATCH": 16}.items():
        monkeypatch.setattr(glide_start, name, value)
    config, decoder = cli.load_config("configs/glide.py:shipped"), load_bundle(shipped.FOLDER / "decoder")
    captions = [caption for _, caption in emoji_scenes.scenes("single", "test")][::8]
    embeddings = load_bundle(shipped.FOLDER / "clip").params["text"]["positions"][: len(captions)]
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)  # one of its own for each caption
    tokens = Tokenizer(decoder.tokenizer_bytes).encode(captions, config.model.text.context, ends=False)
    params = glide_start.trained(config, decoder, tokens, embeddings)

    teacher, student = (make_stage(c).conditioner() for c in (decoder.config, config))
    given = {"params": decoder.params["conditioner"]}, *tokens, embeddings, np.ones(len(captions), bool)
    expected, found = teacher.apply(*given), student.apply({"params": params["conditioner"]}, *tokens)
    for aim, made in ((expected.emb, found.emb), (expected.context[:, -4:], found.context[:, -4:])):
        assert np.mean((made - aim) ** 2) < 0.5 * np.mean(np.var(aim, axis=0)), "closer than the mean of all"
    chex.assert_trees_all_equal(params["unet"], decoder.params["unet"])


@pytest.mark.slow
@pytest.mark.parametrize(("model", "cascade"), [("decoder", "shipped:"), ("glide", "shipped:glide")])
def test_models_draw_as_well_as_the_manifest_says(model, cascade):
    """The first pictures of those that were measured."""
    captions = [text for _, text in emoji_scenes.scenes("single", "test")]
    images = Cascade.load(cascade).generate(captions, 0)["images"][-1]
    found = {result.name: result.value for result in scene_scores.score(images, captions)}
    for name, known in MODELS[model]["measured"]["single"]["first"].items():
        np.testing.assert_allclose(found[name], known["value"], atol=0.04)
