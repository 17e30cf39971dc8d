import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from shrink import leaves, small_config

from unclip_jax import paths
from unclip_jax.bundle import check_params, load_bundle, save_bundle
from unclip_jax.cli import load_config
from unclip_jax.config import BEFORE
from unclip_jax.errors import UserError
from unclip_jax.paths import files_below, to_path


@pytest.fixture
def model():
    config = ConfigDict({"model": {"width": 8, "channel_mult": (1, 2, (3, 4)), "name": None}, "dtype": "bfloat16"})
    rng = np.random.default_rng(0)
    params = {
        "text": {"block_0": {"kernel": jnp.asarray(rng.normal(size=(4, 8)), jnp.float32), "bias": jnp.zeros(8)}},
        "logit_scale": jnp.float32(2.5),
    }
    return config, params


def save(path, model, tokenizer=b"pieces", clip="", extra=None, stage="clip"):
    return save_bundle(str(path), stage, *model, tokenizer, clip, extra or {})


def test_bucket_round_trip(bucket, tmp_path, model):
    identity = save(f"{bucket}/runs/b", model)
    bundle = load_bundle(f"{bucket}/runs/b")
    assert bundle.identity == identity == save(tmp_path / "b", model) and bundle.tokenizer_bytes == b"pieces"
    assert files_below(to_path(bucket)) == [f"runs/b/{path.name}" for path in sorted((tmp_path / "b").iterdir())]
    other = save(f"{bucket}/runs/b", model, tokenizer=None)
    assert load_bundle(f"{bucket}/runs/b").tokenizer_bytes is None and other != identity
    (to_path(bucket) / "runs" / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a bundle: give a new folder"):
        save(f"{bucket}/runs/full", model)
    with pytest.raises(UserError, match="runs/full is not a bundle: it has no"):
        load_bundle(f"{bucket}/runs/full")
    with pytest.raises(UserError, match=r"no bundle at gs://bucket/.*/nowhere: there is no such folder"):
        load_bundle(f"{bucket}/nowhere")
    (to_path(bucket) / "runs" / "b" / "weights.safetensors").unlink()
    with pytest.raises(UserError, match="runs/b lacks weights"):
        load_bundle(f"{bucket}/runs/b")


def test_half_as_large_a_bundle_is_the_rounded_model(tmp_path, model):
    """Its identity is that of the same numbers in float32, so that models trained against either go together."""
    config, params = model
    identity = save_bundle(tmp_path / "half", "clip", config, params, b"pieces", "", {}, half=True)
    half = load_bundle(tmp_path / "half")
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16).astype(np.float32), params)
    assert half.identity == identity == save(tmp_path / "b", (config, rounded)) != save(tmp_path / "c", model)
    for found, expected in zip(jax.tree.leaves(half.params), jax.tree.leaves(rounded), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
    sizes = [(tmp_path / name / "weights.safetensors").stat().st_size for name in ("half", "b")]
    saved = 2 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert abs(sizes[1] - sizes[0] - saved) <= 8  # to which a header is filled up
    with pytest.raises(UserError, match="text/block_0/kernel holds numbers beyond float16: store this model in fl"):
        params["text"]["block_0"]["kernel"] *= 1e6
        save_bundle(tmp_path / "large", "clip", config, params, b"pieces", "", {}, half=True)
    assert not (tmp_path / "large").exists()


def test_bundle_in_a_bucket_is_none_until_it_is_complete(bucket, model, monkeypatch):
    """Cut off after one of its files: neither the old bundle nor the new one, but no mixture of them."""
    save(f"{bucket}/b", model)
    copied, copy = [], paths._copy

    def cut_off(source, target, progress):
        if copied:
            raise OSError("the network is gone")
        copied.append(copy(source, target, progress))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the network is gone"):
        patch.setattr(paths, "_copy", cut_off)
        save(f"{bucket}/b", (model[0], {"w": jnp.zeros(3)}))
    with pytest.raises(UserError, match="b is not a bundle: it has no"):
        load_bundle(f"{bucket}/b")


def test_round_trip(tmp_path, model):
    config, params = model
    identity = save(tmp_path / "b", model, clip="abc", extra={"steps": [64, 250], "π": 0.1})
    bundle = load_bundle(str(tmp_path / "b"))
    assert bundle.stage == "clip" and bundle.tokenizer_bytes == b"pieces" and bundle.clip_identity == "abc"
    assert bundle.identity == identity and len(identity) == 64
    assert bundle.extra == {"steps": (64, 250), "π": 0.1}
    assert bundle.config.to_dict() == config.to_dict() and bundle.config.model.channel_mult == (1, 2, (3, 4))
    assert jax.tree.structure(bundle.params) == jax.tree.structure(params)
    for found, expected in zip(jax.tree.leaves(bundle.params), jax.tree.leaves(params), strict=True):
        assert found.dtype == np.float32 and found.shape == expected.shape and np.array_equal(found, expected)
    with pytest.raises(AttributeError):
        bundle.config.model.widht = 9  # locked


def test_files_are_what_any_reader_of_their_formats_expects(tmp_path, model):
    save(tmp_path / "b", model)
    with safe_open(tmp_path / "b" / "weights.safetensors", "numpy") as file:
        assert sorted(file.keys()) == ["logit_scale", "text/block_0/bias", "text/block_0/kernel"]
        assert file.get_slice("text/block_0/kernel").get_dtype() == "F32"
    description = json.loads((tmp_path / "b" / "config.json").read_text())
    assert description["format"] == 1 and description["stage"] == "clip"
    assert description["config"]["model"] == {"width": 8, "channel_mult": [1, 2, [3, 4]], "name": None}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["b", "config.json", "tokenizer.model", "weights.safetensors"]


def test_half_precision_is_widened_exactly(tmp_path, model):
    save(tmp_path / "b", (model[0], {"w": jnp.asarray([1.0, 1.0078125, -3e38], jnp.bfloat16)}), tokenizer=None)
    bundle = load_bundle(str(tmp_path / "b"))
    assert bundle.params["w"].dtype == np.float32 and bundle.tokenizer_bytes is None
    assert np.array_equal(bundle.params["w"], np.array([1.0, 1.0078125, jnp.bfloat16(-3e38)], np.float32))


def test_identity_follows_content_alone(tmp_path, model):
    config, params = model
    first = save(tmp_path / "a", model)
    assert save(tmp_path / "elsewhere", model, extra={"note": 1}, clip="x") == first
    one_bit = params | {"logit_scale": np.nextafter(np.float32(2.5), np.float32(3))}
    other = config.copy_and_resolve_references()
    other.model.width = 9
    identities = {
        first,
        save(tmp_path / "b", (config, one_bit)),
        save(tmp_path / "c", (other, params)),
        save(tmp_path / "d", model, tokenizer=b"other"),
        save(tmp_path / "e", model, tokenizer=None),
        save(tmp_path / "f", model, stage="noised_clip"),
    }
    assert len(identities) == 6


def test_older_bundle_is_replaced_and_foreign_folder_is_not(tmp_path, model):
    save(tmp_path / "b", model)
    save(tmp_path / "b", model, tokenizer=None)
    assert load_bundle(str(tmp_path / "b")).tokenizer_bytes is None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(UserError, match="exists and is not a bundle"):
        save(tmp_path / "mine", model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "mine"]


def test_failed_save_leaves_what_was_there(tmp_path, model, monkeypatch):
    identity = save(tmp_path / "b", model)

    def disk_full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("unclip_jax.bundle._written", disk_full)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "b", (model[0], {"w": jnp.zeros(3)}))
    assert load_bundle(str(tmp_path / "b")).identity == identity
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_failed_rename_leaves_what_was_there(tmp_path, model, monkeypatch):
    identity, rename = save(tmp_path / "b", model), os.rename

    def refuse(source, target):
        if str(source).endswith("/new"):
            raise OSError("not now")
        rename(source, target)

    monkeypatch.setattr("os.rename", refuse)
    with pytest.raises(OSError, match="not now"):
        save(tmp_path / "b", (model[0], {"w": jnp.zeros(3)}))
    assert load_bundle(str(tmp_path / "b")).identity == identity
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_config_that_json_cannot_hold_is_an_error_before_anything_is_written(tmp_path, model):
    with pytest.raises(UserError, match="what JSON cannot"):
        save(tmp_path / "b", (ConfigDict({"dtype": jnp.float32}), model[1]))
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_and_foreign_folder(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        load_bundle(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"is not a bundle: it has no config.json"):
        load_bundle(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a bundle: its config.json cannot be read"):
        load_bundle(str(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, model, value):
    """When they are stored, and when someone else has stored them."""
    with pytest.raises(UserError, match="logit_scale has 1 values not finite"):
        save(tmp_path / "b", (model[0], model[1] | {"logit_scale": jnp.float32(value)}))
    assert not (tmp_path / "b").exists()
    save(tmp_path / "b", model)
    file = tmp_path / "b" / "weights.safetensors"
    weights = load_file(file)
    for other, says in ((np.float32(value), "has 1 values not finite"), (np.int32(3), "as int32: expected float32 or")):
        save_file(weights | {"logit_scale": np.array(other)}, file)
        with pytest.raises(UserError, match=f"logit_scale {says}"):
            load_bundle(tmp_path / "b")


def test_what_a_killed_process_left_is_deleted(tmp_path, model):
    for name in (".b.saving-x1/new", ".c.saving-x2"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / ".b.saving-x1/new/weights.safetensors").write_bytes(b"half")
    save(tmp_path / "b", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.saving-x2", "b"]


def test_truncated_missing_and_changed_files(tmp_path, model):
    save(tmp_path / "b", model)
    path = tmp_path / "b" / "weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(UserError, match="damaged or cut short"):
        load_bundle(str(tmp_path / "b"))
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="sha256 differs"):
        load_bundle(str(tmp_path / "b"))
    path.unlink()
    with pytest.raises(UserError, match=r"lacks weights.safetensors"):
        load_bundle(str(tmp_path / "b"))
    path.write_bytes(whole)
    (tmp_path / "b" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="sha256 differs"):
        load_bundle(str(tmp_path / "b"))


def test_newer_format_is_an_error(tmp_path, model):
    save(tmp_path / "b", model)
    path = tmp_path / "b" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2, "library": "unclip_jax 9.0"}))
    with pytest.raises(UserError, match=r"format 2 and was written by unclip_jax 9.0; this library reads up to 1"):
        load_bundle(str(tmp_path / "b"))


def test_check_params_lists_every_difference(model):
    _, params = model
    abstract = jax.eval_shape(lambda: params)
    check_params(params, abstract)
    block = {"kernel": np.zeros((8, 4)), "gain": np.zeros(8)}
    wrong = {"text": {"block_0": block}, "logit_scale": params["logit_scale"]}
    with pytest.raises(UserError) as error:
        check_params(wrong, abstract)
    assert str(error.value) == (
        "the weights do not fit the model: missing text/block_0/bias (8,); unexpected text/block_0/gain (8,); "
        "text/block_0/kernel is (8, 4), expected (4, 8)"
    )


def test_check_params_of_another_model_stays_readable():
    leaves = {f"layer_{i}": np.zeros(1) for i in range(100)}
    with pytest.raises(UserError, match=r"and 80 more$"):
        check_params({}, leaves)


@pytest.mark.parametrize("name", ["decoder", "upsampler_256"])
def test_bundle_of_an_earlier_version_has_the_keys_that_came_later(name, tmp_path):
    """They say what its model was, whatever new ones are; its config.json in the bundle trains one like it again."""
    config = small_config(name).unlock()
    before = BEFORE[""] | BEFORE[config.stage]
    for key in before:
        section, _, last = key.rpartition(".")
        del config[section][last]
    config.lock()
    save_bundle(tmp_path / "bundle", config.stage, config, {"w": np.zeros(3)}, None, "", {})
    expected = leaves(config) | before
    assert leaves(load_bundle(tmp_path / "bundle").config) == expected
    assert leaves(load_config(str(tmp_path / "bundle" / "config.json"))) == expected
