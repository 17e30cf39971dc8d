"""Runs that start from a trained model: whole, with a part frozen, or by low-rank changes; of every stage."""

import json
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
from shrink import (
    CONFIGS,
    compilation_cache,
    leaves,
    random_batch,
    save_pictures,
    small_config,
    small_stage,
    tokenizer_bytes,
)

from unclip_jax import cli, train
from unclip_jax.bundle import load_bundle, save_bundle
from unclip_jax.config_checks import check_config
from unclip_jax.errors import UserError
from unclip_jax.origin import load_origin
from unclip_jax.stages import make_stage
from unclip_jax.training.leaves import named_leaves
from unclip_jax.training.sharding import make_mesh

FAST = ("clip", "prior_diffusion")


def save(folder, name, clip="", tokenizer=True, **sections):
    """A random bundle of a shrunk config, whose sections are changed; its folder and identity."""
    stage, _, params = small_stage(name)
    config = stage.config.copy_and_resolve_references().unlock()
    for section, values in sections.items():
        config[section].update(values)
    identity = save_bundle(folder, config.stage, config, params, tokenizer_bytes() if tokenizer else None, clip, {})
    return SimpleNamespace(folder=str(folder), identity=identity, params=jax.tree.map(np.asarray, params))


def config_of(name, bundle, **sections):
    config = small_config(name).unlock()
    config.init.bundle = bundle
    for section, values in sections.items():
        config[section].update(values)
    return config.lock()


def origin(name, bundle, clip_identity="", **sections):
    config = config_of(name, bundle, **sections)
    clip = small_stage("clip")[0] if "clip" in config else None
    return load_origin(config, make_stage(config, clip), clip_identity)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_a_run_of_every_stage_starts_from_a_bundle(name, tmp_path):
    clip = "0123" if "clip" in small_config(name) else ""
    bundle = save(tmp_path / "bundle", name, clip)
    config = small_config(name)
    free = {"optim": dict(learning_rate=0.5), "train": dict(batch_size=8)}
    for section, key, value in (("model", "remat", True), ("diffusion", "drop_caption", 0.9)):
        if section in config and key in config[section]:
            free[section] = {key: value}
    found = origin(name, bundle.folder, clip, **free)
    chex.assert_trees_all_equal(found.params, bundle.params)
    assert found.tokenizer_bytes == tokenizer_bytes()
    if clip:
        with pytest.raises(UserError, match=r"trained against another CLIP than clip\.bundle"):
            origin(name, bundle.folder, "4567")


@pytest.mark.parametrize(
    ("name", "sections", "says"),
    [
        ("clip", dict(model=dict(mean=(0.5, 0.5, 0.5))), r"model\.mean is \(0\.5, 0\.5, 0\.5\) in the config, \(0\.48"),
        ("clip", dict(model=dict(text=dict(heads=4))), r"model\.text\.heads is 4 in the config, 2 in init\.bundle"),
        ("prior_diffusion", dict(diffusion=dict(schedule="linear")), r"diffusion\.schedule is linear"),
        ("decoder", dict(diffusion=dict(predicts="eps")), r"diffusion\.predicts is eps in the config, x0 in"),
        ("upsampler_256", dict(model=dict(factor=2)), r"model\.factor is 2 .*--config\.init\.model=True"),
    ],
)  # fmt: skip
def test_another_model_is_refused_by_the_first_key_that_differs(name, sections, says, tmp_path):
    bundle = save(tmp_path / "bundle", name)
    with pytest.raises(UserError, match=says):
        origin(name, bundle.folder, **sections)


def test_an_upsampler_may_train_on_other_windows(tmp_path):
    bundle = save(tmp_path / "bundle", "upsampler_256", tokenizer=False)
    chex.assert_trees_all_equal(origin("upsampler_256", bundle.folder, model=dict(patch=32)).params, bundle.params)


def test_a_clip_becomes_a_noised_one_that_sees_the_same_at_every_timestep(tmp_path):
    plain, _, params = small_stage("clip")
    bundle = save(tmp_path / "bundle", "clip")
    model = dict(image_size=16, activation="quick_gelu", image=dict(patch=8))  # as the CLIP's own
    found = origin("clip_noised", bundle.folder, model=model).params
    noised = make_stage(config_of("clip_noised", bundle.folder, model=model))
    images = random_batch(plain, 3)["image"]
    x = images.astype(np.float32) / 127.5 - 1
    expected = jax.jit(plain.embed_images)(params, images)
    for t in (0, 999):
        np.testing.assert_allclose(jax.jit(noised.embed_noised)(found, x, np.full(3, t)), expected, atol=1e-5)
    with pytest.raises(UserError, match=r"model\.activation is gelu in the config, quick_gelu in"):
        origin("clip_noised", bundle.folder)


def test_analytic_variances_come_and_go_with_the_sampler(tmp_path):
    bundle = save(tmp_path / "bundle", "prior_diffusion", "0123")
    assert "fixed" in bundle.params
    assert "fixed" not in origin("prior_diffusion", bundle.folder, "0123", sampling=dict(sampler="ddpm")).params


def test_low_rank_changes_need_a_model(tmp_path):
    with pytest.raises(UserError, match=r"name it in init\.bundle"):
        origin("prior_diffusion", "", optim=dict(lora_rank=2))


def test_text_towers_are_refused(tmp_path):
    config = small_config("clip").unlock()
    with config.ignore_type():
        config.model.image = None
    params = {name: value for name, value in small_stage("clip")[2].items() if name != "image"}
    save_bundle(tmp_path / "bundle", "clip", config, params, tokenizer_bytes(), "", {})
    with pytest.raises(UserError, match="a text tower alone"):
        origin("clip", str(tmp_path / "bundle"))


FLAGS = {"workdir": (str, None, "folder")}


def test_a_converted_model_is_taken_over_with_what_the_command_line_changes(tmp_path):
    """Its config has only the sections that say what it is, and keys of its own."""
    known = small_config("decoder").to_dict()
    known = {name: known[name] for name in ("stage", "dtype", "model", "diffusion", "sampling")}
    known["model"]["text"] = {"width": 8}
    (tmp_path / "config.json").write_text(json.dumps({"config": known}))
    argv = ["train", "--config=configs/decoder.py:small", f"--config.init.bundle={tmp_path}", "--config.init.model"]
    found = cli.parse([*argv, "--config.model.unet.dropout=0.2", "--config.train.steps=7"], FLAGS).config
    small = cli.load_config("configs/decoder.py:small")
    expected = leaves(small.model) | {"unet.dropout": 0.2}
    assert leaves(found.model) != expected
    model = cli.load_config(str(tmp_path / "config.json")).model
    assert leaves(found.model) == leaves(model) | {"unet.dropout": 0.2}
    assert found.diffusion.predicts == "x0" and found.sampling.steps == "3"
    assert (found.train.steps, found.train.batch_size, found.dtype) == (7, small.train.batch_size, small.dtype)
    assert not found.init.model and found.init.bundle == str(tmp_path), "its config.json, run again, is whole"
    for more, says in (
        (["--config.init.bundle="], "which is empty"),
        (["--config=configs/glide.py:small"], "holds a model of stage 'decoder', not 'glide'"),
        (["--config.init.bundle=/nowhere"], "no config file"),
    ):
        with pytest.raises(UserError, match=says):
            cli.parse([*argv, *more], FLAGS)


@pytest.fixture(scope="module", autouse=True)
def cache():
    with compilation_cache():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains a shrunk config on twelve pictures from a random bundle, on one device; more than once where asked."""
    root = tmp_path_factory.mktemp("runs")
    pictures = save_pictures(root / "pictures")
    clip = save(root / "clip", "clip")

    def trained(name, label, of="", **sections):
        uses_clip = "clip" in small_config(name)
        bundle = save(root / f"{label}_origin", of or name, clip.identity if uses_clip else "")
        sections.setdefault("data", {}).update(dict(source=f"folder:{pictures}", threads=1))
        if uses_clip:
            sections["clip"] = dict(bundle=clip.folder)
        config = config_of(name, bundle.folder, **sections)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
            report = train.run(config, str(root / label))
        return SimpleNamespace(
            config=config, report=report, origin=bundle, folder=root / label,
            bundle=lambda: load_bundle(str(root / label / "bundle")),
            log=[json.loads(line) for line in (root / label / "metrics.jsonl").read_text().splitlines()],
        )  # fmt: skip

    return trained


def stored_average(run, step):
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer().restore(run.folder / "checkpoints" / str(step) / "ema")


@pytest.mark.slow
def test_low_rank_changes_are_merged_into_the_bundle_and_resumed_bit_for_bit(trained):
    optim = dict(lora_rank=2, learning_rate=0.01, warmup_steps=0, schedule="constant")
    fast = dict(steps=4, checkpoint_every=2, sample_every=100)
    straight = trained("clip", "lora", optim=optim, train=fast)
    assert [line["step"] for line in straight.log] == [1, 2, 3, 4]
    trained("clip", "halves", optim=optim, train=fast | dict(steps=2))
    halves = trained("clip", "halves", optim=optim, train=fast)
    assert halves.report["sha256"] == straight.report["sha256"]

    # An ordinary bundle: the kernels, changed by the averaged factors, and all else as it was.
    before, after = named_leaves(straight.origin.params), named_leaves(straight.bundle().params)
    assert before.keys() == after.keys()
    average = stored_average(straight, 4)
    assert average.keys() == {"lora"}
    factors = named_leaves(average["lora"])
    for name, value in before.items():
        if f"{name}/A" in factors:
            change = np.matmul(factors[f"{name}/A"], factors[f"{name}/B"], dtype=np.float64)
            assert np.abs(change).max() > 1e-4, name
            np.testing.assert_allclose(after[name], value + change, rtol=1e-5, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(after[name], value, err_msg=name)


@pytest.mark.slow
def test_a_frozen_part_of_a_decoder_is_the_bundles(trained):
    run = trained("decoder", "frozen", optim=dict(frozen=("conditioner", "unet/time")), train=dict(sample_every=1))
    after = run.bundle().params
    chex.assert_trees_all_equal(after["conditioner"], run.origin.params["conditioner"])
    assert not np.array_equal(after["unet"]["conv_in"]["kernel"], run.origin.params["unet"]["conv_in"]["kernel"])
    assert stored_average(run, 2).keys() == {"unet"}


@pytest.mark.slow
def test_a_noised_clip_is_trained_from_a_clip_in_microbatches(trained):
    model = dict(image_size=16, activation="quick_gelu", image=dict(patch=8))
    run = trained("clip_noised", "noised", of="clip", model=model, optim=dict(accumulate=2), train=dict(steps=2))
    assert run.bundle().params["image"]["timesteps"].shape == (1000, 16)
    assert run.bundle().tokenizer_bytes == tokenizer_bytes()
    assert all(np.isfinite(line["loss"]) for line in run.log)


@pytest.mark.slow
def test_an_autoregressive_prior_keeps_the_codes_that_it_was_trained_with(trained):
    run = trained("prior_ar", "codes")
    chex.assert_trees_all_equal(run.bundle().params["fixed"], run.origin.params["fixed"])


def test_an_upsampler_with_a_last_step_is_trained_from_a_bundle_alone(tmp_path):
    """Converted weights bring the second network, which training leaves alone."""
    config = small_config("upsampler_256").unlock()
    config.data.source, config.model.last_step = "folder:.", True
    with pytest.raises(UserError, match="last_step is true"):
        check_config(config, str(tmp_path))
    config.init.bundle = str(tmp_path / "bundle")
    check_config(config, str(tmp_path / "run"))
