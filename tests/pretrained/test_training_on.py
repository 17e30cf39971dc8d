"""Converted models of every family are trained on, by the commands of docs/fine_tuning.md."""

import jax
import numpy as np
import pytest
import vocabularies
from safetensors.numpy import save_file
from shrink import compilation_cache, random_params, save_pictures, small_config, tokenizer_bytes
from test_edit_eps import save_karlo
from test_glide import convert as convert_glide
from test_glide import glide_tensors, save_vocabulary
from test_openai_clip import run as convert_clip
from test_openai_clip import tensors as clip_tensors

from unclip_jax import train
from unclip_jax.bundle import load_bundle, save_bundle
from unclip_jax.config_checks import check_config
from unclip_jax.errors import UserError
from unclip_jax.stages import make_stage
from unclip_jax.training.sharding import make_mesh

MODELS = {  # bundle → its config
    "clip": "clip",
    "glide/decoder": "glide",
    "glide/inpaint/decoder": "glide",
    "glide/upsampler_256": "glide_upsampler",
    "karlo/prior": "prior_diffusion",
    "karlo/decoder": "decoder",
    "karlo/upsampler_256": "upsampler_256",
}
TRAINED = ("clip", "glide/decoder", "karlo/prior", "karlo/decoder", "karlo/upsampler_256")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("converted")
    for name in ("clip_source", "glide_source", "karlo"):
        (root / name).mkdir()
    save_pictures(root / "pictures", 24)
    save_file(clip_tensors("openai"), root / "clip_source/ViT.safetensors")
    vocabularies.save_clip(root / "clip_source", [])
    convert_clip(root / "clip_source", root / "clip", "--head-channels", "8")

    for name, inputs in {"base": 3, "upsample": 6, "base_inpaint": 7}.items():
        save_file(glide_tensors(inputs), root / f"glide_source/{name}.safetensors")
    save_vocabulary(root / "glide_source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unclip_jax.pretrained.glide.SIDES", {"base": 8, "upsample": 32})
        convert_glide(root / "glide_source", root / "glide")
    save_karlo(root / "karlo")
    return root


def flags(root, name, *more):
    words = ["train", f"--config=configs/{MODELS[name]}.py:tiny", f"--config.init.bundle={root / name}"]
    words += ["--config.init.model=True", "--config.optim.lora_rank=2", "--workdir=run", "--config.data.min_side=0"]
    words += [f"--config.data.source=folder:{root / 'pictures'}", "--config.data.threads=1", *more]
    words += ["--config.optim.frozen=('last',)"] * (name == "karlo/upsampler_256")
    words += [f"--config.clip.bundle={root / 'karlo/clip'}"] * (name in ("karlo/prior", "karlo/decoder"))
    return train.parse(words).config


@pytest.mark.parametrize("name", MODELS)
def test_the_config_of_its_kind_is_complete(root, name):
    config = flags(root, name)
    check_config(config, "run")
    assert config.model.to_dict() == load_bundle(root / name).config.model.to_dict()


def test_captions_that_a_model_reads_itself_need_a_vocabulary(root):
    config = flags(root, "karlo/prior").unlock()
    config.model.caption = "own"
    with pytest.raises(UserError, match=r"model\.vocab_size is 0, but the model itself reads captions"):
        check_config(config, "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_it_trains(root, name, tmp_path, monkeypatch):
    steps = ["--config.train.steps=1", "--config.train.batch_size=4", "--config.train.eval_size=8"]
    config = flags(root, name, *steps, "--config.optim.learning_rate=0.1", "--config.optim.warmup_steps=0")
    monkeypatch.setattr(train, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
    with compilation_cache():
        train.run(config, str(tmp_path / "run"))
    before, after = load_bundle(root / name).params, load_bundle(tmp_path / "run/bundle").params
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert jax.tree.all(jax.tree.map(lambda leaf: np.isfinite(leaf).all(), after))
    assert sum(jax.tree.leaves(changed)) > 5


def test_a_clip_that_reads_captions_alone_is_refused_at_once(root, tmp_path):
    config = small_config("clip").unlock()
    config.model.update(dict(dim=24, unit_norm=False))
    config.model.text.update(dict(width=24, context=7))
    with config.ignore_type():
        config.model.image = None
    params = random_params(make_stage(config.lock()))
    save_bundle(tmp_path / "clip", "clip", config, params, tokenizer_bytes(), "", {})
    for name in ("karlo/prior", "karlo/decoder"):
        changed = flags(root, name).unlock()
        changed.clip.bundle = str(tmp_path / "clip")
        changed.init.bundle, changed.optim.lora_rank = "", 0
        with pytest.raises(UserError, match=r"clip\.bundle reads captions alone, .*: expected a CLIP that sees"):
            train.run(changed.lock(), str(tmp_path / "run"))
