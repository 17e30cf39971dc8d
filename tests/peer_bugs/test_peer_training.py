"""What other code bases got wrong about training: the average, the optimizer, noise and gradients on many devices."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from shrink import random_batch, save_pictures, small_config

from unclip_jax import stages, train
from unclip_jax.models.clip import normalize
from unclip_jax.stages.base import Stage, diffusion_loss
from unclip_jax.stages.clip import Clip
from unclip_jax.training.checkpoint import Checkpointer
from unclip_jax.training.optimizer import ema_update, make_optimizer
from unclip_jax.training.sharding import global_batch, make_mesh
from unclip_jax.training.state import abstract_state, init_state, make_train_step, root_key

ROWS = 32
PEAK, WARMUP, STEPS, DECAY = 0.01, 4, 20, 0.6


def config_of(**optim):
    numbers = dict(learning_rate=PEAK, warmup_steps=WARMUP, schedule="cosine", b1=0.9, b2=0.99, eps=1e-8)
    numbers |= dict(weight_decay=0.0, clip_norm=0.0, ema_decay=DECAY, accumulate=1, frozen=(), lora_rank=0)
    train = {"steps": STEPS, "batch_size": ROWS, "max_skips": 3}
    return ConfigDict({"dtype": "float32", "optim": numbers | optim, "train": train})


def mesh_of(devices):
    """Devices in pairs along the axis that splits parameters, where there are pairs."""
    fsdp = min(devices, 2)
    return make_mesh(ConfigDict({"data": devices // fsdp, "fsdp": fsdp}), jax.devices()[:devices])


class Run:
    """A stage in training: its state, and the metrics of its steps so far."""

    def __init__(self, stage, devices=1, config=None):
        self.stage, self.config, self.mesh = stage, config or config_of(), mesh_of(devices)
        self._step = make_train_step(stage, self.config, self.mesh)
        self.state, self.log = init_state(stage, self.config, self.mesh, 0), []

    def step(self, batch):
        """One step; the parameters after it."""
        self.state, metrics = self._step(self.state, {}, global_batch(batch, self.mesh), root_key(0))
        self.log.append(jax.device_get(metrics))
        return self.params()

    def params(self):
        return jax.tree.map(np.array, self.state.params)

    def first_gradient(self):
        """As Adam was given it by the first step: its first moment is then a tenth of it."""
        return jax.tree.map(lambda m: np.array(m) / 0.1, optax.tree_utils.tree_get(self.state.opt_state, "mu"))


class Line:
    """The loss is the mean of x · w, so that its gradient is the mean of x."""

    tpu_options = None

    def init(self, key):
        return {"kernel": jax.random.normal(key, (4, 1))}

    def loss(self, params, frozen, batch, key):
        return jnp.mean(batch["x"] @ params["kernel"]), {}

    def project(self, params):
        return params


def rows(value=1.0, spread=1.0):
    noise = np.random.default_rng(0).normal(size=(ROWS, 4))
    return {"x": (spread * (noise - noise.mean(0)) + value).astype(np.float32)}


def rate_by_hand(k):
    return PEAK * min(1, (k + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * max(0, k - WARMUP) / (STEPS - WARMUP)))


def test_average_starts_as_the_model():
    """DALLE2-pytorch#131: `state_dict(x)` for `load_state_dict(x)` left the average at a random start of its own."""
    state = Run(Line(), 8).state
    np.testing.assert_array_equal(state.ema["kernel"], state.params["kernel"])


def test_average_follows_the_decay_of_every_step():
    """diffusers#1864: the decay asked for was overwritten by that of the first step and stayed there."""
    run = Run(Line())
    expected = np.asarray(run.state.ema["kernel"], np.float64)
    for k in range(12):
        decay = min(DECAY, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * run.step(rows())["kernel"]
        np.testing.assert_allclose(run.state.ema["kernel"], expected, rtol=1e-5)


def test_average_forgets_its_start_and_averages_floats_alone():
    """improved-diffusion#59: 0.9999 from the first step on samples noise for 10,000 steps; DALLE2-pytorch#149: counters
    were averaged."""
    ema, params = {"w": jnp.ones(2), "count": jnp.int32(0)}, {"w": jnp.zeros(2), "count": jnp.int32(7)}
    steps = 30
    for k in range(steps):
        ema = ema_update(ema, params, jnp.int32(k), 0.9999)
    left = math.factorial(steps) * math.factorial(9) / math.factorial(steps + 9)  # product of (1 + k) / (10 + k)
    np.testing.assert_allclose(ema["w"], left, rtol=1e-4)
    assert int(ema["count"]) == 7


class Pixel(Stage):
    """Learns the mean colour of its pictures; evaluating it draws the average of its parameters."""

    @property
    def images(self):
        return {"image": 8}

    def init(self, key):
        return {"colour": jax.random.uniform(key, (3,))}

    def loss(self, params, frozen, batch, key, train=True):
        colours = batch["image"].astype(jnp.float32) / 255 + 0.1 * jax.random.normal(key, batch["image"].shape)
        return jnp.mean(jnp.square(colours - params["colour"].reshape(1, 1, 1, 3))), {}

    def evaluate(self, params, frozen, batch, key):
        return {"red": params["colour"][0]}


def test_looking_at_samples_changes_nothing_in_training(tmp_path, monkeypatch):
    """DALLE2-pytorch#87: sampling put the average in the model's place and did not put the model back."""
    monkeypatch.setitem(stages.STAGES, "pixel", Pixel)
    monkeypatch.setattr(train, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
    pictures, found = save_pictures(tmp_path / "pictures"), []
    for every in (1, 1000):
        config = small_config("upsampler_256").unlock()
        config.stage = "pixel"
        config.data.update(dict(source=f"folder:{pictures}", threads=1))
        config.train.update(dict(steps=4, sample_every=every, checkpoint_every=4))
        found.append(train.run(config.lock(), str(tmp_path / str(every)))["sha256"])
    looks = (tmp_path / "1" / "evaluation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in looks] == [1, 2, 3, 4]
    assert found[0] == found[1]


def test_moments_belong_to_names_whatever_the_order_of_parameters():
    """DALLE2-pytorch#115: groups built from sets, so that a resumed optimizer had the moments of other parameters."""
    optim = config_of(warmup_steps=0, schedule="constant").optim
    optimizer = make_optimizer(optim, STEPS)
    slopes = {"a": (1.0, 3.0), "b": (-2.0, 0.5), "c": (10.0, -10.0)}
    params = {name: jnp.zeros(2) for name in slopes}
    state = optimizer.init(params)
    changes = {}
    for k, names in enumerate(("abc", "cab")):
        grads = {name: jnp.full(2, slopes[name][k]) for name in names}
        changes, state = optimizer.update(grads, state, {name: params[name] for name in names}, step=jnp.int32(k))
    for name, (first, second) in slopes.items():
        m = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
        v = (0.99 * 0.01 * first**2 + 0.01 * second**2) / (1 - 0.99**2)
        np.testing.assert_allclose(changes[name], -PEAK * m / math.sqrt(v), rtol=1e-4)


@pytest.mark.parametrize(("value", "clipped"), [(0.3, 0.3), (5.0, 0.5)])
def test_the_gradient_that_is_clipped_is_the_mean_of_all_microbatches(value, clipped):
    """DALLE2-pytorch (fixed in 1924c7c) clipped gradients still multiplied by the scale of the loss."""
    # Four numbers of `value` have norm 2 value: 0.6 is left alone below 1, though the sum of four microbatches is not.
    run = Run(Line(), 2, config_of(clip_norm=1.0, accumulate=4))
    run.step(rows(value))
    np.testing.assert_allclose(run.first_gradient()["kernel"], np.full((4, 1), clipped), rtol=1e-5)
    np.testing.assert_allclose(run.log[0]["grad_norm"], 2 * value, rtol=1e-5)


def test_learning_rate_that_is_logged_is_the_one_applied_also_after_resuming(tmp_path):
    """DALLE2-pytorch!262: the schedule was bound to no optimizer, so that the rate never moved."""
    run = Run(Line())
    before = run.params()["kernel"]
    for k in range(7):
        if k == 5:
            checkpoints = Checkpointer(str(tmp_path), 2)
            checkpoints.save(run.state, {})
            checkpoints.wait()
            run = Run(Line())
            run.state = checkpoints.restore_latest(abstract_state(run.stage, run.config, run.mesh))
            checkpoints.close()
        after = run.step(rows())["kernel"]
        # Adam's step on a gradient that is always the same is the rate itself.
        np.testing.assert_allclose(before - after, rate_by_hand(k), rtol=1e-3)
        np.testing.assert_allclose(run.log[-1]["learning_rate"], rate_by_hand(k), rtol=1e-5)
        before = after


def test_a_batch_with_nan_changes_nothing_and_training_goes_on():
    """guided-diffusion#50: NaN in the forward pass, and the run went on with ruined parameters for days."""
    run = Run(Line(), 8)
    before = jax.tree.map(np.array, run.state[2:])
    bad = rows()
    bad["x"][5, 2] = np.nan
    run.step(bad)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.state[2:]), before)
    assert run.log[-1]["skipped"] == 1 and int(run.state.step) == 1
    assert np.isfinite(run.step(rows())["kernel"]).all() and run.log[-1]["skipped"] == 1


class Noise(Line):
    """Diffuses pictures of nothing, and tells about the noise: the largest cosine between two rows of it, how many
    timesteps were drawn, and a sum that changes with any of its numbers."""

    def loss(self, params, frozen, batch, key):
        def network(x_t, t):
            self.seen = x_t, t
            return jnp.mean(params["kernel"]) * x_t

        loss, _ = diffusion_loss(small_config("prior_diffusion"), network, batch["x"], key)
        x_t, t = self.seen
        unit = x_t / jnp.linalg.norm(x_t, axis=-1, keepdims=True)
        weights = jnp.arange(x_t.size, dtype=jnp.float32).reshape(x_t.shape) / x_t.size
        return loss, {
            "closest": jnp.max(unit @ unit.T - 2 * jnp.eye(len(unit))),
            "timesteps": 1 + jnp.sum(jnp.diff(jnp.sort(t)) > 0),
            "sum": jnp.sum(weights * x_t),
        }


@functools.cache
def noise_on(devices):
    """Metrics of two steps of `Noise`; what they have in rows is dealt out over so many devices."""
    run = Run(Noise(), devices)
    for _ in range(2):
        run.step({"x": np.zeros((ROWS, 64), np.float32)})
    return run.log


def test_every_row_has_noise_of_its_own_on_whatever_device():
    """FlaxDiff (fixed in f3a69f6) gave every device the same key: the same noise for each part of the batch."""
    for metrics in noise_on(8):
        assert metrics["closest"] < 0.8  # the cosine of 64 random numbers with 64 others is 0 ± 1/8
    assert noise_on(8)[0]["sum"] != noise_on(8)[1]["sum"]


def test_timesteps_are_drawn_for_the_whole_batch():
    """FlaxDiff (fixed in 3028cf1) drew as many timesteps as a device has rows, and used them on all devices."""
    for one, eight in zip(noise_on(1), noise_on(8), strict=True):
        assert eight["timesteps"] > 0.8 * ROWS
        np.testing.assert_allclose(eight["loss"], one["loss"], rtol=1e-5)


def test_noise_is_the_same_on_any_number_of_devices():
    """jax#40232: random numbers that depend on how many shards they are drawn on."""
    for devices in (2, 8):
        for one, many in zip(noise_on(1), noise_on(devices), strict=True):
            np.testing.assert_allclose(many["sum"], one["sum"], rtol=1e-4)


class PlainClip(Clip):
    """CLIP's own loss over towers that are one matrix each: a picture's mean colour, a caption's first word."""

    def init(self, key):
        image, text = jax.random.split(key)
        return {
            "image": jax.random.normal(image, (3, 4)),
            "text": jax.random.normal(text, (200, 4)),
            "logit_scale": jnp.log(jnp.float32(5.0)),
        }

    def _model(self):
        return self

    def apply(self, variables, images, tokens, length):
        params = variables["params"]
        z_i, z_t = jnp.mean(images, axis=(1, 2)) @ params["image"], params["text"][tokens[:, 0]]
        return normalize(z_i), normalize(z_t), jnp.exp(params["logit_scale"])


def contrastive_loss(params, colours, words):
    """In float64: the mean of both cross entropies over all pairs of the batch."""
    z_i, z_t = colours @ params["image"], params["text"][words]
    z_i, z_t = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z_i, z_t))
    logits = np.exp(params["logit_scale"]) * z_i @ z_t.T
    return np.mean([np.log(np.exp(rows).sum(1)) - np.diag(rows) for rows in (logits, logits.T)])


def test_contrastive_gradient_does_not_grow_with_the_number_of_devices():
    """open_clip#616: the gradient of gathered embeddings came multiplied by the number of devices."""
    stage = PlainClip(small_config("clip"))
    m, batch = stage.config.model, random_batch(stage, ROWS)
    colours = (batch["image"].mean((1, 2), dtype=np.float64) / 255 - m.mean) / m.std
    run = Run(stage, 8)
    start = jax.tree.map(lambda leaf: np.array(leaf, np.float64), run.state.params)
    run.step(batch)
    loss = functools.partial(contrastive_loss, colours=colours, words=batch["tokens"][:, 0])
    np.testing.assert_allclose(run.log[0]["loss"], loss(start), rtol=1e-5)
    ours = run.first_gradient()
    for name, place in (("logit_scale", ()), ("image", (0, 1)), ("image", (2, 3))):
        nudge = np.zeros_like(start[name])
        nudge[place] = 1e-5
        up, down = (loss(start | {name: start[name] + sign * nudge}) for sign in (1, -1))
        np.testing.assert_allclose(ours[name][place], (up - down) / 2e-5, rtol=1e-3, atol=1e-6)
