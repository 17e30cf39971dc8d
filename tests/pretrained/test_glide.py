"""GLIDE's released files, at the size of a toy: from a folder of state dicts to pictures."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_adm import state_dict

from unclip_jax.cascade import Cascade
from unclip_jax.errors import UserError
from unclip_jax.pretrained.__main__ import main
from unclip_jax.pretrained.karlo_stages import convert_prior
from unclip_jax.pretrained.state_dict import StateDict
from unclip_jax.pretrained.tokenizers import END, byte_symbols

WIDTH, CONTEXT, DEPTH, VOCABULARY = 8, 12, 2, 257
ARGS = ["--head-channels", "8", "--heads", "2"]


def glide_tensors(inputs, seed=0):
    """A state dict by the names of GLIDE's release: U-Net with its text path; 6 channels out."""
    rng = np.random.default_rng(seed)
    tensors = state_dict(32, (1, 2), 1, (2,), True, True, True, inputs, 6, WIDTH)

    def add(name, *shape):
        tensors[name] = (0.3 * rng.normal(size=shape)).astype(np.float32)

    add("token_embedding.weight", VOCABULARY, WIDTH)
    for name in ("positional_embedding", "padding_embedding"):
        add(name, CONTEXT, WIDTH)
    layers = {"transformer_proj": (128, WIDTH), "final_ln": (WIDTH,)}
    for n in range(DEPTH):
        here = f"transformer.resblocks.{n}"
        layers |= {f"{here}.ln_1": (WIDTH,), f"{here}.ln_2": (WIDTH,)}
        layers |= {f"{here}.attn.c_qkv": (3 * WIDTH, WIDTH), f"{here}.attn.c_proj": (WIDTH, WIDTH)}
        layers |= {f"{here}.mlp.c_fc": (4 * WIDTH, WIDTH), f"{here}.mlp.c_proj": (WIDTH, 4 * WIDTH)}
    for name, shape in layers.items():
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0])
    return tensors


def save_vocabulary(folder):
    """GPT-2's two files, of single bytes."""
    tokens = [*byte_symbols(), END]
    (folder / "encoder.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glide")
    for name, inputs in {"base": 3, "upsample": 6, "base_inpaint": 7, "upsample_inpaint": 10}.items():
        tensors = glide_tensors(inputs)
        for part in ("weight", "bias"):
            tensors[f"out.2.{part}"] *= 0.05  # else the variances that random weights give are infinite
        save_file(tensors, folder / f"{name}.safetensors")
    save_vocabulary(folder)
    return folder


def convert(folder, out, *more):
    return main(["pretrained", "glide", str(folder), "--out", str(out), *ARGS, *more])


@pytest.mark.slow
def test_release_becomes_a_cascade_that_draws(source, tmp_path, monkeypatch):
    monkeypatch.setattr("unclip_jax.pretrained.glide.SIDES", {"base": 8, "upsample": 32})
    assert convert(source, tmp_path / "out") == 0
    for folder in ("out", "out/inpaint"):
        cascade = Cascade.load(str(tmp_path / folder))
        for model in (cascade.decoder, *cascade.upsamplers):
            with model.stage.config.unlocked():
                model.stage.config.sampling.steps = "2"
        cascade.check_prompts(["a corgi"])
        drawn = cascade.generate(["a corgi", "dog"], seed=0)
        assert drawn["embeddings"] is None
        assert [images.shape for images in drawn["images"]] == [(2, 8, 8, 3), (2, 32, 32, 3)]
        assert len(np.unique(drawn["images"][1])) > 20


def test_inference_settings_are_the_releases(source, tmp_path):
    convert(source, tmp_path / "out")
    read = lambda place: json.loads((tmp_path / "out" / place / "config.json").read_text())["config"]  # noqa: E731
    base, upsampler, inpaint = read("decoder"), read("upsampler_256"), read("inpaint/decoder")
    assert (base["diffusion"]["schedule"], upsampler["diffusion"]["schedule"]) == ("cosine", "linear")
    assert (base["sampling"]["guidance_scale"], inpaint["sampling"]["guidance_scale"]) == (3.0, 5.0)
    assert (upsampler["sampling"]["steps"], upsampler["sampling"]["temperature"]) == ("fast27", 0.997)
    assert "guidance_scale" not in upsampler["sampling"]
    assert (base["model"]["image_size"], upsampler["model"]["image_size"]) == (64, 256)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: (f / "encoder.json").unlink(), "no vocabulary in"),
        (lambda f: (f / "base.safetensors").write_bytes((f / "base.safetensors").read_bytes()[:-100]), "cut short"),
        (lambda f: save_file({"a": np.zeros(3)}, f / "base.safetensors"), "it is not the model that was named"),
        (lambda f: save_file(glide_tensors(3) | {"more": np.zeros(3)}, f / "base.safetensors"), "unexpected more"),
        (lambda f: (f / "base.safetensors").rename(f / "something.safetensors"), "no model of GLIDE"),
    ],
    ids=["no vocabulary", "cut short", "another model", "a tensor too many", "no model"],
)
def test_bad_files_are_one_clear_line(tmp_path, break_it, says):
    folder = tmp_path / "glide"
    folder.mkdir()
    save_file(glide_tensors(3), folder / "base.safetensors")
    save_vocabulary(folder)
    break_it(folder)
    with pytest.raises(UserError, match=says) as caught:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("heads", ["0", "5"])
def test_heads_that_do_not_fit_are_refused(heads, tmp_path):
    """0: one for each 64 channels, of which this text path has fewer."""
    save_file(glide_tensors(3), tmp_path / "base.safetensors")
    save_vocabulary(tmp_path)
    with pytest.raises(UserError, match=r"attention heads do not fit a transformer of \d+ channels: give .* --heads"):
        convert(tmp_path, tmp_path / "out", "--heads", heads)


def test_a_model_without_a_last_norm_is_refused(tmp_path):
    """Of GLIDE's text path, or of Karlo's prior."""
    tensors = {name: value for name, value in glide_tensors(3).items() if "final_ln" not in name}
    save_file(tensors, tmp_path / "base.safetensors")
    save_vocabulary(tmp_path)
    with pytest.raises(UserError, match=r"base\.safetensors has no final_ln: it was trained with xf_final_ln=False"):
        convert(tmp_path, tmp_path / "out")
    prior = {"clip_img_proj.weight": (8, 4), "positional_embedding": (1, 9, 8), "text_enc_proj.weight": (8, 6)}
    prior |= {"transformer.resblocks.0.ln_1.weight": (8,)}
    prior = StateDict({name: np.zeros(shape, np.float32) for name, shape in prior.items()}, "prior.ckpt")
    with pytest.raises(UserError, match=r"prior\.ckpt has no final_ln: .* a prior's final_ln=False"):
        convert_prior(prior, np.zeros(4), np.ones(4), heads=2)


@pytest.mark.parametrize("family", ["glide", "karlo"])
def test_a_file_in_place_of_the_folder_is_refused(family, tmp_path):
    (tmp_path / "base.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"base\.pt is a file: give the folder that all files of"):
        main(["pretrained", family, str(tmp_path / "base.pt"), "--out", str(tmp_path / "out")])


def test_a_model_without_blocks_is_refused(tmp_path):
    tensors = {name: value for name, value in glide_tensors(3).items() if "resblocks" not in name}
    save_file(tensors, tmp_path / "base.safetensors")
    save_vocabulary(tmp_path)
    with pytest.raises(UserError, match=r"has no tensor transformer\.resblocks\.0\.ln_1\.weight: it is not the model"):
        convert(tmp_path, tmp_path / "out")


def test_pickles_that_are_no_state_dicts_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    save_vocabulary(tmp_path)
    for content in ([1, 2, 3], {"step": 5}, print):
        torch.save(content, tmp_path / "base.pt")
        with pytest.raises(UserError, match=r"base\.pt") as caught:
            convert(tmp_path, tmp_path / "out")
        assert "\n" not in str(caught.value)


def test_torch_files_and_safetensors_give_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    tensors, found = glide_tensors(3), {}
    for kind in ("pt", "safetensors"):
        folder = tmp_path / kind
        folder.mkdir()
        save_vocabulary(folder)
        if kind == "pt":
            torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, folder / "base.pt")
        else:
            save_file(tensors, folder / "base.safetensors")
        convert(folder, folder / "out")
        found[kind] = json.loads((folder / "out/decoder/config.json").read_text())["identity"]
    assert found["pt"] == found["safetensors"]


def test_vocabulary_of_another_model_is_refused(tmp_path):
    tensors = glide_tensors(3)
    tensors["token_embedding.weight"] = tensors["token_embedding.weight"][:100]
    save_file(tensors, tmp_path / "base.safetensors")
    save_vocabulary(tmp_path)
    with pytest.raises(UserError, match="257 tokens, the model 100"):
        convert(tmp_path, tmp_path / "out")


def test_output_in_the_way_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="is in the way"):
        convert(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(("name", "place"), [("base", "decoder"), ("upsample", "upsampler_256")])
def test_checkpoints_of_glide_finetune_are_known_by_their_own_name(source, tmp_path, name, place):
    folder = tmp_path / "finetuned"
    folder.mkdir()
    shutil.copy(source / f"{name}.safetensors", folder / "glide-ft-2x1500.safetensors")
    for file in ("encoder.json", "vocab.bpe"):
        shutil.copy(source / file, folder)
    assert convert(folder, tmp_path / "out") == 0
    assert [path.parent.name for path in (tmp_path / "out").rglob("config.json")] == [place]
    shutil.copy(source / f"{name}.safetensors", folder)
    with pytest.raises(UserError, match=rf"glide-ft-2x1500.safetensors and {name}.safetensors are the same model"):
        convert(folder, tmp_path / "out2")
