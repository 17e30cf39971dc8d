"""The shipped configs: the papers' numbers, typed in here from the papers, and every size fit to run."""

import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from shrink import CONFIGS, leaves

from unclip_jax import cli, plan, train
from unclip_jax.data.emoji_scenes import EmojiScenes
from unclip_jax.diffusion.schedule import make_schedule, respace
from unclip_jax.stages import make_stage
from unclip_jax.training.optimizer import make_optimizer

SIZES = ("paper", "small", "tiny")
# config → key → its values in SIZES. A key or value that is changed on purpose is changed there by hand.
VALUES = json.loads((Path(__file__).parent / "config_values.json").read_text())


def load(name, size):
    return cli.load_config(f"configs/{name}.py:{size}")


# arXiv 2204.06125, appendix C, table 3. Sampling steps 27 are spaced as GLIDE's ("fast27").
# GLIDE: 2112.10741, section 4.1 and appendix B.2; learning rate, Adam and EMA, which are not in it: ADM's (2105.05233).
TRAINING = {
    #                 batch   steps      learning rate  b2   eps   weight decay  EMA
    "prior_ar": (4096, 1_000_000, 1.6e-4, 0.91, 1e-10, 4.0e-2, 0.999),
    "prior_diffusion": (4096, 600_000, 1.1e-4, 0.96, 1e-6, 6.0e-2, 0.9999),
    "decoder": (2048, 800_000, 1.2e-4, 0.999, 1e-8, 0.0, 0.9999),
    "upsampler_256": (1024, 1_000_000, 1.2e-4, 0.999, 1e-8, 0.0, 0.9999),
    "upsampler_1024": (512, 1_000_000, 1.0e-4, 0.999, 1e-8, 0.0, 0.9999),
    "glide": (2048, 2_500_000, 3e-4, 0.999, 1e-8, 0.0, 0.9999),
    "glide_upsampler": (512, 1_600_000, 3e-4, 0.999, 1e-8, 0.0, 0.9999),
}
DIFFUSION = {
    #                 steps, schedule, sampling steps, sampler
    "prior_diffusion": (1000, "cosine", 64, "analytic"),
    "decoder": (1000, "cosine", 250, "ddpm"),
    "upsampler_256": (1000, "cosine", 27, "ddim"),
    "upsampler_1024": (1000, "linear", 15, "ddim"),
    "glide": (1000, "cosine", 150, "ddpm"),
    "glide_upsampler": (1000, "linear", 27, "ddim"),
}
MODELS = {
    # unCLIP, appendix C; temperature and normalisation: the CLIP paper and its code.
    "clip": {
        "model.image_size": 256,
        "model.image.patch": 16,
        "model.image.width": 1280,
        "model.image.depth": 32,
        "model.text.width": 1024,
        "model.text.depth": 24,
        "model.image.heads": 1280 // 64,
        "model.text.heads": 1024 // 64,
        "model.text.vocab_size": 49408,
        "model.text.context": 77,
        "model.dim": 1024,
        "model.activation": "quick_gelu",
        "model.initial_scale": 1 / 0.07,
        "model.max_scale": 100.0,
        "model.mean": (0.48145466, 0.4578275, 0.40821073),
        "model.std": (0.26862954, 0.26130258, 0.27577711),
    },
    # Section 2.2: mean squared error of x0, text dropped 10 %, two draws; no guidance (section 4: it hurt).
    "prior_diffusion": {
        "model.width": 2048,
        "model.depth": 24,
        "model.heads": 32,
        "model.context": 256,
        "model.embedding_dim": 1024,
        "diffusion.predicts": "x0",
        "diffusion.learned_variance": False,
        "diffusion.snr_clip": (),
        "diffusion.embedding_scale": 17.2,
        "diffusion.drop_text": 0.1,
        "sampling.draws": 2,
        "sampling.guidance_scale": 1.0,
    },
    # Section 2.2, appendix C: PCA to 319 codes of 1,024 buckets, text dropped 10 %, dot products of the top half.
    "prior_ar": {
        "model.embedding_dim": 1024,
        "model.num_codes": 319,
        "model.num_buckets": 1024,
        "model.context": 384,
        "model.width": 1664,
        "model.depth": 24,
        "model.heads": 26,
        "model.text.width": 2048,
        "model.text.depth": 24,
        "model.text.heads": 32,
        "model.text.context": 256,
        "prior.drop_text": 0.1,
        "sampling.dot_percentile": 50,
    },
    # Section 2.1, table 3; topology, dropout and head size of ADM's 64 pixel model; guidance of table 2.
    "decoder": {
        "model.image_size": 64,
        "model.embedding_dim": 1024,
        "model.image_tokens": 4,
        "model.unet.channels": 512,
        "model.unet.channel_mult": (1, 2, 3, 4),
        "model.unet.res_blocks": 3,
        "model.unet.attention": (64 // 32, 64 // 16, 64 // 8),
        "model.unet.middle_attention": True,
        "model.unet.head_channels": 64,
        "model.unet.dropout": 0.1,
        "model.text.width": 2048,
        "model.text.depth": 24,
        "model.text.heads": 32,
        "model.text.context": 256,
        "diffusion.predicts": "eps",
        "diffusion.learned_variance": True,
        "diffusion.drop_embedding": 0.1,
        "diffusion.drop_caption": 0.5,
        "sampling.guidance_scale": 1.25,
    },
    # Table 3: crops of a quarter of the side; blur of section 2.1 (kernel 3, sigma 0.6).
    "upsampler_256": {
        "model.image_size": 256,
        "model.factor": 4,
        "model.patch": 256 // 4,
        "model.unet.channels": 320,
        "model.unet.channel_mult": (1, 2, 3, 4),
        "model.unet.res_blocks": 3,
        "model.unet.dropout": 0.1,
        "diffusion.predicts": "eps",
        "diffusion.learned_variance": True,
        "diffusion.blur_sigma": 0.6,
        "sampling.eta": 0.0,
    },
    "upsampler_1024": {
        "model.image_size": 1024,
        "model.factor": 4,
        "model.patch": 1024 // 4,
        "model.unet.channels": 192,
        "model.unet.channel_mult": (1, 1, 2, 2, 4, 4),
        "model.unet.res_blocks": 2,
        "model.unet.dropout": 0.0,
        "diffusion.predicts": "eps",
        "diffusion.learned_variance": True,
        "sampling.eta": 0.0,
    },
    # Section 4.1; topology and dropout: ADM's of the same sizes; heads: the release's; guidance: appendix B, figure 5.
    "glide": {
        "model.image_size": 64,
        "model.factor": 0,
        "model.inpaint": False,
        "model.unet.channels": 512,
        "model.unet.channel_mult": (1, 2, 3, 4),
        "model.unet.res_blocks": 3,
        "model.unet.attention": (64 // 32, 64 // 16, 64 // 8),
        "model.unet.middle_attention": True,
        "model.unet.head_channels": 64,
        "model.unet.dropout": 0.1,
        "model.text.width": 2048,
        "model.text.depth": 24,
        "diffusion.predicts": "eps",
        "diffusion.learned_variance": True,
        "diffusion.drop_caption": 0.0,
        "sampling.guidance_scale": 3.0,
        "sampling.temperature": 1.0,
    },
    # Interpolation: section 2.1; temperature: the release's notebook.
    "glide_upsampler": {
        "model.image_size": 256,
        "model.factor": 4,
        "model.interpolation": "bicubic",
        "model.round_low_res": True,
        "model.inpaint": False,
        "model.unet.channels": 384,
        "model.unet.channel_mult": (1, 1, 2, 2, 4, 4),
        "model.unet.res_blocks": 2,
        "model.unet.attention": (256 // 32, 256 // 16, 256 // 8),
        "model.unet.middle_attention": True,
        "model.unet.head_channels": 64,
        "model.unet.dropout": 0.0,
        "model.text.width": 1024,
        "diffusion.predicts": "eps",
        "diffusion.learned_variance": True,
        "sampling.eta": 0.0,
        "sampling.temperature": 0.997,
    },
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_is_the_papers(name):
    config = load(name, "paper")
    o = config.optim
    found = (config.train.batch_size, config.train.steps, o.learning_rate, o.b2, o.eps, o.weight_decay, o.ema_decay)
    assert found == TRAINING[name]
    assert (o.b1, o.schedule, o.accumulate) == (0.9, "constant", 1)
    assert config.data.crop == "dalle"  # arXiv 2102.12092, whose data unCLIP and GLIDE reuse


def test_training_of_clip_is_clips():
    """arXiv 2103.00020, hyperparameters of the vision transformers; learning rate: unCLIP, appendix C."""
    config = load("clip", "paper")
    o = config.optim
    assert (o.learning_rate, o.b1, o.b2, o.eps, o.weight_decay) == (3e-4, 0.9, 0.98, 1e-6, 0.2)
    assert (o.warmup_steps, o.schedule, config.train.batch_size) == (2000, "cosine", 32768)
    epochs = config.train.steps * config.train.batch_size / 650e6  # unCLIP, appendix C: about 650M pictures
    assert epochs == pytest.approx(32, rel=0.05)


@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusion_is_the_papers(name):
    d, s = load(name, "paper").diffusion, load(name, "paper").sampling
    assert (d.timesteps, d.schedule, s.sampler) == (*DIFFUSION[name][:2], DIFFUSION[name][3])
    assert respace(make_schedule(d.schedule, d.timesteps), s.steps).num_steps == DIFFUSION[name][2]


@pytest.mark.parametrize("name", MODELS)
def test_model_is_the_papers(name):
    config = load(name, "paper")
    assert {key: config[key] for key in MODELS[name]} == MODELS[name]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_locked_and_fits_the_code(name, size, tmp_path):
    config = load(name, size)
    for section in (config, *(part for part in config.values() if hasattr(part, "is_locked"))):
        assert section.is_locked
    with pytest.raises(AttributeError, match="dpeth"):
        config.model.dpeth = 3
    if size == "paper":
        assert config.data.source == ""  # a paper's model is trained on data of one's own
        return
    train.check_config(config, str(tmp_path))
    kind, _, scenes = config.data.source.partition("/")
    assert kind == "tfds:emoji_scenes" and scenes in EmojiScenes.builder_configs
    assert EmojiScenes.builder_configs[scenes].size >= config.model.get("image_size", 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_values_are_those_that_are_written_down(name):
    """Types included: 1 is not 1.0, and a list is no tuple."""
    found = [leaves(load(name, size)) for size in SIZES]
    assert {key: repr(tuple(config[key] for config in found)) for key in found[0]} == {
        key: repr(cli.lists_to_tuples(values)) for key, values in VALUES[name].items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_have_the_same_keys(name):
    paper, *others = ({key: type(value) for key, value in leaves(load(name, size)).items()} for size in SIZES)
    for other in others:
        assert other == paper


@pytest.mark.parametrize("size", SIZES)
def test_stages_of_a_size_make_a_cascade(size):
    configs = {name: load(name, size) for name in CONFIGS}
    for name in ("prior_diffusion", "prior_ar", "decoder"):
        assert configs["clip"].model.dim == configs[name].model.embedding_dim
        make_stage(configs[name], make_stage(configs["clip"]))
    side = {name: config.model.image_size for name, config in configs.items() if "image_size" in config.model}
    assert side["clip_noised"] == side["decoder"] == side["glide"]
    assert side["upsampler_256"] == side["decoder"] * configs["upsampler_256"].model.factor
    assert side["upsampler_1024"] == side["upsampler_256"] * configs["upsampler_1024"].model.factor
    assert side["glide_upsampler"] == side["glide"] * configs["glide_upsampler"].model.factor


LIKE_OTHERS = ("clip_noised", "decoder", "upsampler_256", "glide_upsampler")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name in CONFIGS]
)
def test_papers_loss_and_update_hold_together(name):
    """By shapes alone: nothing of these models is allocated."""
    config, clip = load(name, "paper"), make_stage(load("clip", "paper"))
    stage = make_stage(config, clip if "clip" in config else None)
    frozen = jax.eval_shape(clip.init, jax.random.key(0)) if "clip" in config else {}
    params = jax.eval_shape(stage.init, jax.random.key(0))
    loss, metrics = jax.eval_shape(stage.loss, params, frozen, stage.batch_spec(64), jax.random.key(0))
    assert loss.shape == () and loss.dtype == jnp.float32
    assert all(value.shape == () for value in jax.tree.leaves(metrics))
    optimizer = make_optimizer(config.optim, config.train.steps)
    update = lambda p: optimizer.update(p, optimizer.init(p), p, step=jnp.int32(0))[0]  # noqa: E731
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert shapes(jax.eval_shape(update, params)) == shapes(params)


@functools.cache
def count(name, size):
    return sum(plan.parameters(load(name, size)).values())


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("name", CONFIGS)
def test_smaller_models_are_smaller(name, size):
    """Their networks fit together, each size well below the one before."""
    smaller, larger = (count(name, s) for s in (size, SIZES[SIZES.index(size) - 1]))
    assert 0 < 2 * smaller < larger


RELEASED = {
    "model.unet.channels": 192,
    "model.text.context": 128,
    "model.text.width": 512,
    "model.text.depth": 16,
    "model.text.heads": 8,
}


@pytest.mark.parametrize(
    ("name", "changes", "size"),
    [
        # Section 4.1: 2.3B and 1.2B for the text; 1.5B. Counted with the public code at these sizes.
        ("glide", {"model.text.context": 128}, 3_554_414_086),
        ("glide_upsampler", {"model.text.context": 128}, 1_540_932_998),
        # The public weights.
        ("glide", RELEASED, 385_030_726),
        ("glide", RELEASED | {"model.inpaint": True}, 385_037_638),
        ("glide_upsampler", RELEASED, 398_361_286),
        ("glide_upsampler", RELEASED | {"model.inpaint": True}, 398_368_198),
    ],
)
def test_glide_has_as_many_parameters_as_the_public_code(name, changes, size):
    config = load(name, "paper").unlock()
    config.update_from_flattened_dict(changes)
    assert sum(plan.parameters(config).values()) == size


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_tiny_can_be_trained_measured_and_drawn(name):
    """Shapes alone, at its own size: other tests run each stage, with smaller networks."""
    config = load(name, "tiny")
    clip = make_stage(load("clip", "tiny"))
    stage = make_stage(config, clip if "clip" in config else None)
    frozen = jax.eval_shape(clip.init, jax.random.key(1)) if "clip" in config else {}
    params = jax.eval_shape(stage.init, jax.random.key(0))
    batch, keys = stage.batch_spec(2), jax.random.split(jax.random.key(0), 2)
    gradient = jax.eval_shape(jax.grad(lambda *given: stage.loss(*given)[0]), params, frozen, batch, keys[0])
    chex.assert_trees_all_equal_shapes(gradient, params)
    examples = jax.eval_shape(stage.draw_examples, params, frozen, batch, keys)
    scalars = jax.eval_shape(stage.evaluate, params, frozen, batch, keys[0])
    scalars |= jax.eval_shape(stage.score_examples, examples)
    assert all(value.shape == () for value in scalars.values())
    assert ("drawn" in examples) == (config.stage != "clip")
    for drawn in examples.values():
        assert len(drawn) == 2
        assert drawn.dtype == (jnp.float32 if config.stage.startswith("prior") else jnp.uint8)


def test_miniature_is_the_papers_recipe():
    """Sizes, the batch and the run are smaller; all else is the paper's."""
    paper, miniature = (leaves(load("decoder", size)) for size in ("paper", "miniature"))
    changed = {name for name in paper if paper[name] != miniature[name]}
    sizes = {"channels", "channel_mult", "res_blocks", "attention", "head_channels", "norm_groups"}
    sizes = {f"model.unet.{name}" for name in sizes} | {"model.image_size", "model.embedding_dim"}
    sizes |= {f"model.text.{name}" for name in ("vocab_size", "context", "width", "depth", "heads")}
    run = {f"train.{name}" for name in ("steps", "batch_size", "checkpoint_every", "sample_every", "keep")}
    run |= {"train.measure", "train.expected_loss"}
    run |= {"data.source", "data.crop", "data.threads", "clip.config"}
    scaled = {f"optim.{name}" for name in ("learning_rate", "warmup_steps", "schedule", "ema_decay")}
    assert changed == sizes | run | scaled
