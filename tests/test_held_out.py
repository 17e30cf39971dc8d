"""Held-out examples: equal numbers on every mesh, nothing of training in them, and metrics of what is drawn."""

import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shrink import random_batch, random_params, small_config, small_stage

from unclip_jax.config_checks import MEASURES
from unclip_jax.data.pipeline import evaluation_batch
from unclip_jax.evaluation import features, frechet
from unclip_jax.evaluation.alignment import classify
from unclip_jax.evaluation.metrics import INCEPTION
from unclip_jax.held_out import HeldOut, programs
from unclip_jax.keys import RowKeys
from unclip_jax.models.mesh import jit_on_mesh
from unclip_jax.stages import make_stage
from unclip_jax.training import sharding
from unclip_jax.training.sharding import batch_sharding, make_mesh, param_shardings, replicated

ROWS = 16


def changed(config, **sections):
    config = config.copy_and_resolve_references().unlock()
    for section, values in sections.items():
        config[section].update(values)
    return config.lock()


def held_out(stage, mesh, folder, examples, **train):
    config = changed(stage.config, train=dict(batch_size=8, eval_size=ROWS, draw_size=10) | train)
    return HeldOut(config, stage, mesh, examples, jax.random.key(3), str(folder))


def meshes():
    config = small_config("decoder").mesh.copy_and_resolve_references().unlock()
    yield make_mesh(config, jax.devices()[:1])
    config.fsdp = 8
    yield make_mesh(config)


@pytest.mark.parametrize("name", [pytest.param("decoder", marks=pytest.mark.slow), "clip"])
def test_numbers_are_equal_on_one_device_and_on_eight(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 1)
    stage, frozen, params = small_stage(name)
    examples, found = random_batch(stage, ROWS), []
    for mesh in meshes():
        placed = jax.device_put(params, param_shardings(params, mesh))
        everywhere = jax.device_put(frozen, replicated(mesh))
        found.append(held_out(stage, mesh, tmp_path / str(mesh.size), examples).measure(1, placed, everywhere)[0])
    assert found[0].keys() == found[1].keys() and "loss" in found[0]
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    line = json.loads((tmp_path / "8" / "evaluation.jsonl").read_text())
    assert line == {"step": 1} | found[1]


def test_each_of_eight_devices_does_an_eighth_and_parameters_are_gathered(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 1)
    stage, frozen, params = small_stage("decoder")
    batch, flops = random_batch(stage, ROWS), []
    for mesh in meshes():
        whole, split = replicated(mesh), batch_sharding(mesh)
        arguments = jax.device_put((params, frozen, batch), (param_shardings(params, mesh), whole, split))
        keys = RowKeys(jax.device_put(jax.random.key(0), whole), *jax.device_put((np.arange(ROWS),) * 2, split))
        key = jax.device_put(jax.random.key(0), whole)
        evaluate, draw, _ = (jit_on_mesh(f, mesh, out_shardings=whole) for f in programs(stage, mesh))
        compiled = [evaluate.lower(*arguments, key).compile(), draw.lower(*arguments, keys).compile()]
        flops.append([program.cost_analysis()["flops"] for program in compiled])
        for program in compiled:
            assert ("all-gather" in program.as_text()) == (mesh.size == 8)
            assert "all-to-all" not in program.as_text() and "collective-permute" not in program.as_text()
    for one, eight in zip(*flops, strict=True):
        assert eight == pytest.approx(one / 8, rel=0.2)  # what embeds one caption's steps is done by all


@pytest.mark.parametrize("name", ["decoder", "glide", "upsampler_256", "prior_diffusion", "prior_ar"])
def test_held_out_loss_drops_and_corrupts_nothing(name):
    stage, frozen, params = small_stage(name)
    batch, key = random_batch(stage, 8), jax.random.key(1)
    spoiled = {
        "decoder": dict(diffusion=dict(drop_caption=1.0, drop_embedding=1.0), model=dict(unet=dict(dropout=0.9))),
        "glide": dict(diffusion=dict(drop_caption=1.0), model=dict(unet=dict(dropout=0.9))),
        "upsampler_256": dict(diffusion=dict(blur_probability=1.0), model=dict(unet=dict(dropout=0.9))),
        "prior_diffusion": dict(diffusion=dict(drop_text=1.0)),
        "prior_ar": dict(prior=dict(drop_text=1.0)),
    }[name]
    other = make_stage(changed(stage.config, **spoiled), stage.clip)
    ours, theirs = (jax.jit(s.evaluate)(params, frozen, batch, key)["loss"] for s in (stage, other))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    assert abs(float(jax.jit(other.loss)(params, frozen, batch, key)[0]) - float(ours)) > 1e-4  # they matter


def test_metrics_of_what_is_drawn(tmp_path, monkeypatch):
    class Mean:
        card: ClassVar = {"weights": "w"}

        def __call__(self, images):
            return {"pool": images.reshape(len(images), -1)[:, :3].astype(np.float32)}

    monkeypatch.setattr(features, "inception", lambda folder, kinds: Mean())
    stage = make_stage(changed(small_config("upsampler_256"), model=dict(patch=16)))
    params = random_params(stage)
    examples = random_batch(stage, 40)
    mesh = next(meshes())
    measured = held_out(stage, mesh, tmp_path, examples, draw_size=40, measure=("fid", "alignment"), inception="i")
    scalars, _ = measured.measure(7, params, {})
    drawn = measured._draw(params, {})
    statistics = [frechet.statistics([Mean()(drawn[name])["pool"]], {}) for name in ("drawn", "true")]
    assert scalars["fid"] == pytest.approx(frechet.frechet_distance(*statistics), rel=1e-6)
    assert scalars["fid_low"] < scalars["fid"] < scalars["fid_high"]
    hits = [a == b for a, b in zip(*(classify(drawn[name])[0] for name in ("drawn", "true")), strict=True)]
    assert scalars["alignment_object"] == np.mean(hits)
    assert (tmp_path / "samples" / "step_00000007.png").exists()


def test_held_out_sample_is_drawn_by_the_seed():
    source = [{"key": str(i), "number": i} for i in range(50)]

    def numbers(n, seed):
        return list(evaluation_batch(source, lambda record, rng: {"n": np.int32(record["number"])}, n, seed)["n"])

    assert numbers(20, 1) == numbers(20, 1) == sorted(set(numbers(20, 1)))
    assert numbers(20, 1) != numbers(20, 2) and numbers(20, 1) != list(range(20))
    assert numbers(99, 1) == list(range(50))


def test_loss_is_the_mean_over_unequal_batches(tmp_path):
    stage, frozen, params = small_stage("glide")

    class Counting(type(stage)):
        def evaluate(self, params, frozen, batch, key):
            return {"loss": jnp.mean(batch["image"].astype(jnp.float32))}

    counting = Counting(stage.config)
    examples = random_batch(stage, ROWS + 3)
    scalars, _ = held_out(counting, next(meshes()), tmp_path, examples).measure(1, params, frozen)
    assert scalars["loss"] == pytest.approx(examples["image"].astype(float).mean(), rel=1e-5)


def test_measures_of_a_config_are_those_that_there_are():
    assert {*INCEPTION, "alignment"} == set(MEASURES)
