"""CLIP's architecture read from names, shapes and config files; where each tensor goes; what is refused."""

import json

import jax
import numpy as np
import pytest
import vocabularies
from safetensors.numpy import save_file

from unclip_jax.bundle import load_bundle
from unclip_jax.errors import UserError
from unclip_jax.pretrained import __main__ as command
from unclip_jax.pretrained import openai_clip
from unclip_jax.pretrained.state_dict import StateDict
from unclip_jax.stages import make_stage
from unclip_jax.training.leaves import differences

BLOCK = {
    "openai": ("ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
    "huggingface": ("layer_norm1", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"),
}
VOCAB = 514


def shapes(form, width, depth, patch, size, text_width, text_depth, dim, vocab=VOCAB, context=77):
    """Names and shapes of a CLIP, as its constructors make them."""
    ours, found = form == "openai", {"logit_scale": ()}

    def pair(name, *shape):
        found.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def blocks(name, count, w):
        norm_1, out, norm_2, mlp_in, mlp_out = BLOCK[form]
        for n in range(count):
            here = f"{name}.{n}."
            for norm in (norm_1, norm_2):
                pair(here + norm, w)
            pair(here + out, w, w)
            pair(here + mlp_in, 4 * w, w)
            pair(here + mlp_out, w, 4 * w)
            if ours:
                found[here + "attn.in_proj_weight"], found[here + "attn.in_proj_bias"] = (3 * w, w), (3 * w,)
            else:
                for letter in "qkv":
                    pair(f"{here}self_attn.{letter}_proj", w, w)

    places = (size // patch) ** 2 + 1
    if ours:
        found |= {"visual.class_embedding": (width,), "visual.conv1.weight": (width, 3, patch, patch)}
        found |= {"visual.positional_embedding": (places, width), "visual.proj": (width, dim)}
        found |= {"token_embedding.weight": (vocab, text_width), "positional_embedding": (context, text_width)}
        found |= {"text_projection": (text_width, dim)}
        norms = ("visual.ln_pre", "visual.ln_post", "ln_final")
        image, text = "visual.transformer.resblocks", "transformer.resblocks"
    else:
        image, text = "vision_model.embeddings", "text_model.embeddings"
        found |= {f"{image}.class_embedding": (width,), f"{image}.patch_embedding.weight": (width, 3, patch, patch)}
        found |= {f"{image}.position_embedding.weight": (places, width), "visual_projection.weight": (dim, width)}
        found |= {f"{text}.token_embedding.weight": (vocab, text_width), "text_projection.weight": (dim, text_width)}
        found |= {f"{text}.position_embedding.weight": (context, text_width)}
        norms = ("vision_model.pre_layrnorm", "vision_model.post_layernorm", "text_model.final_layer_norm")
        image, text = "vision_model.encoder.layers", "text_model.encoder.layers"
    for norm, w in zip(norms, (width, width, text_width), strict=True):
        pair(norm, w)
    blocks(image, depth, width)
    blocks(text, text_depth, text_width)
    return found


def tensors(form, **changes):
    rng = np.random.default_rng(0)
    sizes = dict(width=24, depth=2, patch=4, size=16, text_width=16, text_depth=3, dim=12) | changes
    return {name: np.asarray(rng.normal(size=s), np.float32) for name, s in sorted(shapes(form, **sizes).items())}


def convert(found, **options):
    return openai_clip.convert(StateDict(found, "ViT.pt"), **{"head_channels": 8} | options)


def convert_huggingface(found, vision=None, text=None, preprocessor=None, **options):
    hf_config = {"vision_config": {"num_attention_heads": 3} | (vision or {})}
    hf_config["text_config"] = {"num_attention_heads": 4} | (text or {})
    return openai_clip.convert_huggingface(StateDict(found, "model"), hf_config, preprocessor or {}, **options)


def check(config, params):
    """The parameters are those of the stage that the config describes."""
    stage = make_stage(config.lock())
    assert differences(params, jax.eval_shape(stage.init, jax.random.key(0))) == ""


@pytest.mark.parametrize(
    ("sizes", "heads", "count"),
    [
        (dict(width=768, depth=12, patch=32, size=224, text_width=512, text_depth=12, dim=512), (12, 8), 151_277_313),
        (dict(width=1024, depth=24, patch=14, size=224, text_width=768, text_depth=12, dim=768), (16, 12), 427_616_513),
    ],
)
def test_published_sizes(sizes, heads, count, monkeypatch):
    """ViT-B/32 and ViT-L/14, with every number zero and stored once, so that nothing large is held."""

    def stacked(block, depth):
        leaves, tree = jax.tree.flatten(block(0))
        for n in range(1, depth):
            block(n)
        return {"blocks": tree.unflatten([np.broadcast_to(leaf, (depth, *leaf.shape)) for leaf in leaves])}

    monkeypatch.setattr(openai_clip, "stacked", stacked)
    found = shapes("openai", vocab=49_408, **sizes)
    found = {name: np.broadcast_to(np.float32(0), shape) for name, shape in found.items()}
    config, params = openai_clip.convert(StateDict(found, "ViT.pt"))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    m = config.model
    assert (m.image.heads, m.text.heads) == heads and m.image_size == 224 and m.dim == sizes["dim"]
    assert (m.activation, m.resize, m.max_scale, m.text.context) == ("quick_gelu", "bicubic", 100, 77)
    check(config, params)


def test_openai_tensors_find_their_places():
    found = tensors("openai")
    buffers = {"input_resolution": np.array(16), "context_length": np.array(77), "vocab_size": np.array(VOCAB)}
    config, params = convert(found | buffers, text_heads=4, activation="gelu", unit_norm=False, dtype="bfloat16")
    check(config, params)
    m = config.model
    assert dict(m.image) == dict(patch=4, width=24, depth=2, heads=3, timesteps=0, mlp_width=96)
    assert dict(m.text) == dict(vocab_size=VOCAB, context=77, width=16, depth=3, heads=4, mlp_width=64)
    assert (m.image_size, m.dim, m.activation, m.unit_norm, config.dtype) == (16, 12, "gelu", False, "bfloat16")
    assert (m.mean, m.std) == (openai_clip.MEAN, openai_clip.STD)
    image, text = params["image"], params["text"]
    # PyTorch convolves with [out, in, row, column]; here it is [row, column, in, out].
    assert image["patch"]["kernel"][1, 2, 0, 5] == found["visual.conv1.weight"][5, 0, 1, 2]
    block, theirs = image["transformer"]["blocks"], "visual.transformer.resblocks.1"
    assert block["qkv"]["kernel"][1, 7, 50] == found[f"{theirs}.attn.in_proj_weight"][50, 7]
    assert block["mlp_in"]["kernel"][1, 7, 90] == found[f"{theirs}.mlp.c_fc.weight"][90, 7]
    assert text["transformer"]["blocks"]["norm_2"]["bias"][2, 3] == found["transformer.resblocks.2.ln_2.bias"][3]
    np.testing.assert_array_equal(text["projection"]["kernel"], found["text_projection"])
    np.testing.assert_array_equal(text["tokens"]["embedding"], found["token_embedding.weight"])
    assert params["logit_scale"] == found["logit_scale"]


def test_huggingface_tensors_find_their_places():
    found = tensors("huggingface")
    ids = {f"{tower}_model.embeddings.position_ids": np.arange(17)[None] for tower in ("vision", "text")}
    config, params = convert_huggingface(found | ids)
    check(config, params)
    assert (config.model.image.heads, config.model.text.heads, config.model.unit_norm) == (3, 4, True)
    block, theirs = params["text"]["transformer"]["blocks"], "text_model.encoder.layers.1.self_attn"
    for n, letter in enumerate("qkv"):
        assert block["qkv"]["kernel"][1, 3, 16 * n + 5] == found[f"{theirs}.{letter}_proj.weight"][5, 3]
        assert block["qkv"]["bias"][1, 16 * n + 5] == found[f"{theirs}.{letter}_proj.bias"][5]
    kernel = params["image"]["projection"]["kernel"]
    np.testing.assert_array_equal(kernel, found["visual_projection.weight"].T)
    # What config.json leaves out is as in ViT-B/32.
    assert openai_clip.convert_huggingface(StateDict(found, ""), {}, {})[0].model.image.heads == 12


def test_halves():
    found = tensors("huggingface")
    del found["logit_scale"]
    halves = [{k: v for k, v in found.items() if k.startswith(start)} for start in (("text", "text_"), ("vis",))]
    text, image = (StateDict(half, name) for half, name in zip(halves, ("text_encoder", "image_encoder"), strict=True))
    heads = {"num_attention_heads": 4}, {"num_attention_heads": 3}
    config, params = openai_clip.convert_towers(text, heads[0], image, heads[1], {}, unit_norm=False)
    check(config, params)
    np.testing.assert_allclose(np.exp(params["logit_scale"]), 100, rtol=1e-6)
    config, params = openai_clip.convert_towers(StateDict(halves[0], "text_encoder"), heads[0], None, {}, {})
    assert config.model.image is None and set(params) == {"text", "logit_scale"}
    other = {k: v[:5] if k == "visual_projection.weight" else v for k, v in halves[1].items()}
    with pytest.raises(UserError, match=r"image_encoder does not fit.*visual_projection\.weight is \(5, 24\)"):
        openai_clip.convert_towers(StateDict(halves[0], "t"), heads[0], StateDict(other, "image_encoder"), heads[1], {})


def test_other_models_are_refused():
    found = tensors("openai")
    other = {name: value for name, value in found.items() if not name.startswith("visual.class")}
    with pytest.raises(UserError, match=r"no tensor visual\.class_embedding: it is not the model that was named"):
        convert(other)
    with pytest.raises(UserError, match=r"ViT\.pt is a CLIP with a ResNet: expected a vision transformer"):
        convert(other | {"visual.attnpool.positional_embedding": np.zeros((50, 8), np.float32)})
    with pytest.raises(UserError, match="heads of 64 channels do not fit towers of"):
        convert(found, head_channels=64)
    with pytest.raises(UserError, match=r"7 heads do not share 16 channels of ViT\.pt equally"):
        convert(found, text_heads=7)
    changed = found | {"extra": np.zeros(3, np.float32), "ln_final.bias": np.zeros(3, np.float32)}
    del changed["visual.transformer.resblocks.1.attn.in_proj_bias"]
    with pytest.raises(UserError) as caught:
        convert(changed)
    missing = "missing visual.transformer.resblocks.1.attn.in_proj_bias"
    for wrong in (missing, "unexpected extra", "ln_final.bias is (3,)"):
        assert wrong in str(caught.value)


def test_configs_beyond_ours_are_refused():
    found = tensors("huggingface")
    for options, message in (
        (dict(vision={"hidden_act": "relu"}, text={"hidden_act": "relu"}), "hidden_act is relu: expected one"),
        (dict(text={"hidden_act": "gelu"}), "hidden_act is gelu and quick_gelu: expected one"),
        (dict(vision={"layer_norm_eps": 1e-6}), "layer_norm_eps of the image tower is 1e-06: only 1e-5"),
        (dict(text={"num_attention_heads": 3}), "3 heads do not share 16 channels of model equally"),
        (dict(preprocessor={"size": {"shortest_edge": 18}}), "size={'shortest_edge': 18}: only CLIP's own"),
        (dict(preprocessor={"crop_size": 224}), "crop_size=224: only CLIP's own .* model's 16 pixels"),
        (dict(preprocessor={"resample": 2, "do_center_crop": False}), "do_center_crop=False, resample=2: only"),
    ):
        with pytest.raises(UserError, match=message):
            convert_huggingface(found, **options)


@pytest.mark.parametrize("size", [16, {"shortest_edge": 16}])
def test_preprocessing_is_the_files(size):
    crop = {"height": 16, "width": 16} if isinstance(size, dict) else 16
    given = {"size": size, "crop_size": crop, "resample": 3, "do_resize": True, "do_convert_rgb": True}
    given |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1], "feature_extractor_type": "CLIP"}
    config, _ = convert_huggingface(tensors("huggingface"), preprocessor=given)
    assert (config.model.mean, config.model.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))


def run(source, out, *options):
    return command.main(["", "openai_clip", str(source), "--out", str(out), *options])


@pytest.mark.parametrize("form", ["openai", "huggingface"])
def test_command(form, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    found = tensors(form)
    save_file(found, source / ("ViT.safetensors" if form == "openai" else "model.safetensors"))
    if form == "huggingface":
        heads = {"vision_config": {"num_attention_heads": 3}, "text_config": {"num_attention_heads": 2}}
        (source / "config.json").write_text(json.dumps(heads))
    options = ("--head-channels", "8") if form == "openai" else ()
    with pytest.raises(UserError, match=r"no vocabulary in .*source: expected bpe_simple_vocab"):
        run(source, tmp_path / "out", *options)
    vocabularies.save_clip(source, [("a", "b")])
    with pytest.raises(UserError, match="vocabulary has 515 tokens, the model 514: they do not belong"):
        run(source, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
    vocabularies.save_clip(source, [])
    assert run(source, tmp_path / "out", *options) == 0
    assert f"clip, {sum(v.size for v in found.values()):,} parameters" in capsys.readouterr().err
    bundle = load_bundle(str(tmp_path / "out"))
    assert bundle.stage == "clip" and bundle.tokenizer_bytes.startswith(b"{") and bundle.config.model.unit_norm
    assert (bundle.config.model.image.heads, bundle.config.model.text.heads) == (3, 2)
    if form == "openai":
        assert run(source / "ViT.safetensors", tmp_path / "again", *options) == 0
        assert load_bundle(str(tmp_path / "again")).identity == bundle.identity


def test_command_needs_one_file_of_weights(tmp_path):
    with pytest.raises(UserError, match=r"should hold one file of weights.* but has none"):
        run(tmp_path, tmp_path / "out")
    for name in ("ViT-B-32.pt", "ViT-L-14.pt"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"but has ViT-B-32\.pt, ViT-L-14\.pt: give one"):
        run(tmp_path, tmp_path / "out")


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 24, "patch_size": 4, "head_width": 12},
        "text_cfg": {"context_length": 77, "vocab_size": VOCAB, "width": 16, "heads": 2, "layers": 3},
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"},
}


def test_open_clip_says_heads_activation_mean_and_std(tmp_path):
    save_file(tensors("openai"), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    vocabularies.save_clip(tmp_path, [])
    command.main(["pretrained", "openai_clip", str(tmp_path), "--out", str(tmp_path / "out")])
    m = load_bundle(tmp_path / "out").config.model
    assert (m.image.heads, m.text.heads, m.activation) == (2, 2, "gelu")
    assert (m.mean, m.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("vision_cfg", "timm_model_name", "convnext_base", "vision_cfg.timm_model_name=convnext_base"),
        ("text_cfg", "hf_model_name", "roberta-base", "text_cfg.hf_model_name=roberta-base"),
        ("", "custom_text", True, "custom_text=True"),
        ("preprocess", "interpolation", "bilinear", "interpolation=bilinear"),
        ("preprocess", "resize_mode", "squash", "resize_mode=squash"),
    ],
)
def test_what_open_clip_does_otherwise_is_named(section, key, value, says):
    about = json.loads(json.dumps(OPEN_CLIP))
    part = about["preprocess_cfg"] if section == "preprocess" else about["model_cfg"]
    (part.setdefault(section, {}) if section.endswith("_cfg") else part)[key] = value
    with pytest.raises(UserError, match=f"open_clip_config.json has {says}: only CLIP's own towers"):
        openai_clip.convert_open_clip(StateDict(tensors("openai"), "x"), about)


def test_open_clip_without_activation_and_with_it():
    about = {"model_cfg": OPEN_CLIP["model_cfg"] | {"quick_gelu": True, "custom_text": False}}
    config, _ = openai_clip.convert_open_clip(StateDict(tensors("openai"), "x"), about)
    assert (config.model.activation, config.model.mean) == ("quick_gelu", openai_clip.MEAN)
