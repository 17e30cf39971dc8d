"""UnCLIP of the diffusers library and its networks beside ours, both with the same random weights, at two shapes.

Our side is what a user has: the pipeline's folder, as `save_pretrained` writes it, through the loader. As that is
linear in the weights, it turns gradients into ours too. Networks agree to 1e-4 of the reference's largest value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import tiny_unclip
from diffusers import UnCLIPScheduler
from diffusers.schedulers import scheduling_unclip

from unclip_jax.diffusion.process import predict
from unclip_jax.diffusion.samplers import ddpm_step
from unclip_jax.diffusion.schedule import make_schedule, respace
from unclip_jax.pretrained.diffusers_unclip import _Pipeline
from unclip_jax.stages import make_stage
from unclip_jax.training.leaves import named_leaves

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=tiny_unclip.VARIANTS)
def variant(request, tmp_path_factory):
    """(name, its two pipelines of diffusers, folder with text/ and image/, where they are saved)."""
    folder = tmp_path_factory.mktemp(f"unclip_{request.param}")
    pipelines = tiny_unclip.pipelines(request.param, folder)
    for pipeline, place in zip(pipelines, ("text", "image"), strict=True):
        pipeline.save_pretrained(folder / place)
    return request.param, pipelines, folder


def nchw(array):
    return torch.from_numpy(np.moveaxis(np.asarray(array), -1, 1).copy())


def nhwc(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(seen, name, ours, reference, tolerance=TOLERANCE):
    scale = float(np.abs(reference).max())
    assert scale > 0, name
    error = float(np.abs(np.asarray(ours) - reference).max()) / scale
    seen(name, error)
    assert error < tolerance, f"{name}: {error}"


def differentiated(function):
    """params, weights → function(params) and the gradients of its weighted sum."""

    @jax.jit
    def both(params, weights):
        output, pull_back = jax.vjp(function, params)
        return output, pull_back(weights)[0]

    return both


def compare(seen, name, modules, reference, ours, params, load, rescaled=()):
    """Outputs, and the gradients of sum(output · weights) with respect to every parameter.

    modules: place in the folder → torch module; reference: () → output; ours: `differentiated`; load(tensors): what the
    loader makes of tensors in place of weights, by place and name. rescaled: (leaf, s²) of those that it scales by s.
    """
    output = reference()
    weights = torch.from_numpy(normal(*output.shape, seed=99))
    for module in modules.values():
        module.zero_grad()
    (output * weights).sum().backward()
    output, weights = (nhwc(array) if array.ndim == 4 else array.detach().numpy() for array in (output, weights))

    found_output, found = ours(params, weights)
    close(seen, name, found_output, output)
    gradients = {
        place: {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in module.named_parameters()}
        for place, module in modules.items()
    }
    found, expected = named_leaves(found), named_leaves(load(gradients))
    for leaf, square in rescaled:
        expected[leaf] = expected[leaf] / square
    assert found.keys() == expected.keys()
    largest = max(np.abs(value).max() for value in expected.values())
    errors = {key: float(np.abs(np.asarray(found[key]) - expected[key]).max() / largest) for key in found}
    worst = max(errors, key=errors.get)
    seen(f"{name}, gradients", errors[worst])
    assert errors[worst] < TOLERANCE, worst
    assert sum(np.abs(value).max() > 1e-6 * largest for value in expected.values()) > 0.9 * len(expected)


def loader(folder, part):
    """load of `compare`; part: the loader's method."""

    def load(tensors):
        pipeline = _Pipeline(folder / "text", "float32")
        pipeline.tensors |= tensors
        return getattr(pipeline, part)().params

    return load


def test_prior(variant, seen):
    _, (pipeline, _), folder = variant
    prior, dim = pipeline.prior, pipeline.prior.config.embedding_dim
    context = pipeline.prior.config.num_embeddings
    converted = _Pipeline(folder / "text", "float32").prior()
    stage = make_stage(converted.config)
    np.testing.assert_array_equal(converted.params["embedding_std"], prior.clip_std[0].detach())
    x, z_t, states = normal(2, dim, seed=1), normal(2, dim, seed=2), normal(2, context, dim, seed=3)
    t, length = np.array([3, 41], np.int32), np.array([context - 4, 2], np.int32)
    mask = torch.from_numpy(np.arange(context) < length[:, None])

    def reference():
        return prior(*map(torch.from_numpy, (x, t, z_t, states)), attention_mask=mask).predicted_image_embedding

    @differentiated
    def ours(params):
        network = stage._whitening(params)[0]
        return stage._model().apply({"params": network}, x, t, states, length, z_t)

    compare(seen, "prior", {"prior": prior}, reference, ours, converted.params, loader(folder, "prior"))


def test_decoder(variant, seen):
    name, (pipeline, _), folder = variant
    projection, unet, v = pipeline.text_proj, pipeline.decoder, tiny_unclip.VARIANTS[name]
    size, dim, context = unet.config.sample_size, v["dim"], v["context"]
    converted = _Pipeline(folder / "text", "float32").decoder()
    stage = make_stage(converted.config)
    x, z_i, z_t = normal(2, size, size, 3, seed=1), normal(1, dim, seed=2), normal(2, dim, seed=3)
    states, t = normal(2, context, dim, seed=4), np.array([7, 900], np.int32)
    length = np.array([2, context - 3], np.int32)
    mask = torch.from_numpy(np.arange(context) < length[:, None])
    mask = torch.nn.functional.pad(mask, (v["tokens"], 0), value=True)

    def reference():  # the first row is without an image embedding
        hidden, emb = projection(
            image_embeddings=torch.from_numpy(z_i),
            prompt_embeds=torch.from_numpy(z_t),
            text_encoder_hidden_states=torch.from_numpy(states),
            do_classifier_free_guidance=True,
        )
        return unet(nchw(x), torch.from_numpy(t), hidden, class_labels=emb, attention_mask=mask).sample

    @differentiated
    def ours(params):
        both, has = jnp.concatenate([jnp.zeros_like(z_i), z_i]), jnp.array([False, True])
        conditioning = stage.conditioner().apply(
            {"params": params["conditioner"]}, states, length, z_t, both, has
        )
        return stage._unet().apply({"params": params["unet"]}, x, t, *conditioning)

    # Ours takes sqrt(dim) times the embedding.
    rescaled = [(f"conditioner/{leaf}/kernel", 1 / dim) for leaf in ("image_to_emb", "image_to_tokens")]
    rescaled.append(("conditioner/null_embedding", dim))
    modules, load = {"decoder": unet, "text_proj": projection}, loader(folder, "decoder")
    compare(seen, "decoder", modules, reference, ours, converted.params, load, rescaled)


def test_super_res(variant, seen):
    _, (pipeline, _), folder = variant
    size = pipeline.super_res_first.config.sample_size
    converted = _Pipeline(folder / "text", "float32").upsampler()
    stage = make_stage(converted.config)
    x, t = normal(2, size, size, 6, seed=1), np.array([0, 39], np.int32)

    @differentiated
    def ours(params):
        return stage._unet().apply({"params": params}, x, t)

    for step in ("first", "last"):
        unet, load = getattr(pipeline, f"super_res_{step}"), loader(folder, "upsampler")
        modules, params = {f"super_res_{step}": unet}, converted.params[step]
        compare(
            seen,
            "super-resolution",
            modules,
            lambda unet=unet: unet(nchw(x), torch.from_numpy(t)).sample,
            ours,
            params,
            lambda tensors, step=step, load=load: load(tensors)[step],
        )


SCHEDULERS = {
    "prior": dict(prediction_type="sample", clip_sample_range=5.0),
    "decoder": dict(variance_type="learned_range"),
    "super-resolution": dict(),
    "not clipped": dict(clip_sample=False, num_train_timesteps=65),
    "x0 and variance": dict(prediction_type="sample", variance_type="learned_range", num_train_timesteps=250),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name, seen, monkeypatch):
    scheduler = tiny_unclip.exact_scheduler(**SCHEDULERS[name])
    c = scheduler.config
    learned, predicts = c.variance_type == "learned_range", {"epsilon": "eps", "sample": "x0"}[c.prediction_type]
    x, noise, output = (normal(2, 4, 4, channels, seed=seed) for seed, channels in enumerate((3, 3, 6)))
    output = 0.7 * output if learned else output[..., :3]
    monkeypatch.setattr(scheduling_unclip, "randn_tensor", lambda *args, **rest: nchw(noise))

    @jax.jit
    def ours(schedule, i):
        prediction = predict(schedule, output, x, i, predicts, learned)
        if c.clip_sample:
            x0 = jnp.clip(prediction.x0, -c.clip_sample_range, c.clip_sample_range)
            prediction = prediction._replace(x0=x0)
        return ddpm_step(x, i, prediction, schedule, noise)

    for steps in (2, 7, 25):
        scheduler.set_timesteps(steps)
        schedule = respace(make_schedule("cosine", c.num_train_timesteps), str(steps))
        np.testing.assert_array_equal(schedule.timesteps[::-1], scheduler.timesteps)
        for i, t in enumerate(scheduler.timesteps):
            before = None if i + 1 == steps else scheduler.timesteps[i + 1]
            expected = scheduler.step(nchw(output), t, nchw(x), prev_timestep=before).prev_sample
            close(seen, "scheduler, one step", ours(schedule, steps - 1 - i), nhwc(expected), 1e-5)


def test_timesteps_are_diffusers():
    """For any number of steps. Where a place is half way between two steps, rounding may go either way."""
    scheduler, schedule = UnCLIPScheduler(), make_schedule("cosine", 1000)
    for steps in range(2, 1001):
        scheduler.set_timesteps(steps)
        ours, theirs = respace(schedule, str(steps)).timesteps, scheduler.timesteps.numpy()[::-1]
        half_way = 2 * 999 * np.arange(steps) % (2 * (steps - 1)) == steps - 1
        np.testing.assert_array_equal(ours[~half_way], theirs[~half_way])
        assert np.abs(ours - theirs).max() <= 1
        if steps in (7, 25, 50):  # what Karlo is sampled with
            np.testing.assert_array_equal(ours, theirs)
