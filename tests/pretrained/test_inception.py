"""Inception-v3's public file → a folder to measure with: what is folded, what is refused. Parity is in tests/parity."""

import functools
import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from unclip_jax.bundle import load_bundle
from unclip_jax.errors import UserError
from unclip_jax.evaluation import features
from unclip_jax.models.inception import parameter_shapes
from unclip_jax.pretrained import __main__ as command
from unclip_jax.pretrained.inception import convert
from unclip_jax.pretrained.state_dict import StateDict
from unclip_jax.training.leaves import named_leaves


@functools.cache
def _tensors():
    found = {"fc.weight": np.zeros((1008, 2048), np.float32), "fc.bias": np.zeros(1008, np.float32)}
    for name, leaf in named_leaves(parameter_shapes()).items():
        module = name.rpartition("/")[0].replace("/", ".")
        if not name.endswith("kernel") or module == "fc":
            continue
        height, width, inputs, outputs = leaf.shape
        found[f"{module}.conv.weight"] = np.zeros((outputs, inputs, height, width), np.float32)
        found |= {f"{module}.bn.{part}": np.zeros(outputs, np.float32) for part in ("bias", "running_mean")}
        found |= {f"{module}.bn.{part}": np.ones(outputs, np.float32) for part in ("weight", "running_var")}
        found[f"{module}.bn.num_batches_tracked"] = np.zeros((), np.float32)
    return found


def tensors():
    """Names and shapes of the public file; nearly all numbers are zero."""
    return dict(_tensors())


def run(source, out):
    return command.main(["pretrained", "inception", str(source), "--out", str(out)])


def test_normalisation_is_folded_into_the_convolution():
    found, rng = tensors(), np.random.default_rng(0)
    place = "Mixed_6d.branch7x7_2"
    for name in [name for name in found if name.startswith(f"{place}.") and found[name].ndim]:
        found[name] = rng.uniform(0.5, 2, found[name].shape).astype(np.float32)
    layer = convert(StateDict(found, "inception.pth"))["Mixed_6d"]["branch7x7_2"]
    assert layer["kernel"].shape == (1, 7, 160, 160) and layer["kernel"].dtype == np.float32

    patch = rng.normal(size=(1, 7, 160))
    response = np.einsum("hwi,oihw->o", patch, found[f"{place}.conv.weight"])
    mean, variance, gamma, beta = (
        found[f"{place}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    expected = (response - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    ours = np.einsum("hwi,hwio->o", patch, layer["kernel"].astype(np.float64)) + layer["bias"]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_a_file_becomes_a_folder_that_features_reads(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    save_file(tensors(), tmp_path / "in" / "weights.safetensors")
    sha256 = hashlib.sha256((tmp_path / "in" / "weights.safetensors").read_bytes()).hexdigest()
    assert run(tmp_path / "in", tmp_path / "out") == 0
    description = json.loads((tmp_path / "out" / "config.json").read_text())
    assert description["extra"] == {"source": "weights.safetensors", "source_sha256": sha256}
    assert description["identity"] in capsys.readouterr().err
    assert features.inception(tmp_path / "out").card["weights"] == description["identity"]
    assert load_bundle(tmp_path / "out").params["Conv2d_1a_3x3"]["kernel"].shape == (3, 3, 3, 32)

    with open(tmp_path / "out" / "weights.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(UserError, match="sha256 differs"):
        features.inception(tmp_path / "out")


def test_wrong_sources_are_refused(tmp_path):
    found = tensors()
    del found["Mixed_7b.branch_pool.conv.weight"]
    found["AuxLogits.conv0.conv.weight"] = np.zeros((128, 768, 1, 1), np.float32)
    with pytest.raises(UserError, match=r"missing Mixed_7b.branch_pool.conv.weight; unexpected AuxLogits"):
        convert(StateDict(found, "torchvision.pth"))
    found = tensors() | {"Conv2d_1a_3x3.bn.running_var": np.full(32, -1, np.float32)}
    with np.errstate(invalid="ignore"), pytest.raises(UserError, match="not finite"):
        convert(StateDict(found, "damaged.pth"))

    (tmp_path / "classify_image_graph_def.pb").write_bytes(b"graph")
    (tmp_path / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"cut short")
    (tmp_path / "two").mkdir()
    for name in ("a.pth", "b.pth"):
        (tmp_path / "two" / name).write_bytes(b"")
    for name, says in (
        ("classify_image_graph_def.pb", "a graph of TensorFlow, which is not read"),
        ("weights-inception-2015-12-05-6726825d.pth", "is not the file that its name says"),
        ("two", "holds 2 files of weights"),
    ):
        with pytest.raises(UserError, match=says):
            run(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()
