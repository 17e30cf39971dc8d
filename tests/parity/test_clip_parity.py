"""CLIP against transformers' CLIPModel: embeddings, text states, loss, gradients of all parameters, preprocessing; in
transformers' names, in OpenAI's, and as the two halves that pipelines keep apart."""

import copy
import functools
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vocabularies
from PIL import Image

from unclip_jax.bundle import load_bundle
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.transforms import center_square
from unclip_jax.errors import UserError
from unclip_jax.pretrained import __main__ as command
from unclip_jax.pretrained import openai_clip
from unclip_jax.pretrained.state_dict import StateDict, read_tensors
from unclip_jax.stages import make_stage
from unclip_jax.training.leaves import named_leaves

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
CONTEXT, START, END = 12, 98, 99
# Shrunk, each with something of its own: heads, patches, activation, towers of one width, how the end is found.
STYLES = {
    "B/32": dict(
        vision=dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=16),
        text=dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, eos_token_id=END),
        projection_dim=12,
        act="quick_gelu",
    ),
    "L/14": dict(
        vision=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7),
        text=dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, eos_token_id=2),  # the largest id
        projection_dim=24,
        act="quick_gelu",
    ),
    "H/14": dict(
        vision=dict(hidden_size=20, num_hidden_layers=5, num_attention_heads=2, image_size=20, patch_size=5),
        text=dict(hidden_size=20, num_hidden_layers=1, num_attention_heads=5, eos_token_id=END),
        projection_dim=20,
        act="gelu",
    ),
}


@functools.cache
def reference(style):
    """A CLIPModel with random weights in which nothing is zero."""
    s = STYLES[style]
    vision = s["vision"] | {"intermediate_size": 4 * s["vision"]["hidden_size"], "hidden_act": s["act"]}
    text = s["text"] | {"intermediate_size": 4 * s["text"]["hidden_size"], "hidden_act": s["act"]}
    text |= dict(vocab_size=END + 1, max_position_embeddings=CONTEXT, bos_token_id=START, pad_token_id=1)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=s["projection_dim"])
    torch.manual_seed(len(style))
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 0.5 if "embedding" in name else (p[0].numel() ** -0.5))
            elif p.ndim == 1:
                p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model


def inputs(style, rows=5):
    """(uint8 pictures, tokens, lengths): texts of all lengths, padded with 0 or the end token."""
    rng = np.random.default_rng(1)
    side = STYLES[style]["vision"]["image_size"]
    images = rng.integers(0, 256, (rows, side, side, 3), dtype=np.uint8)
    lengths = np.array([2, CONTEXT, 5, 7, 3][:rows], np.int32)
    tokens = np.where(rng.integers(0, 2, (rows, 1)), 0, END).repeat(CONTEXT, axis=1).astype(np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = [START, *rng.integers(3, START, length - 2), END]
    return images, tokens, lengths


def pixels(images):
    """What the reference's own preprocessing makes of pictures that need neither resizing nor cropping."""
    unit = images.astype(np.float64) / 255
    values = (unit - np.array(openai_clip.MEAN)) / np.array(openai_clip.STD)
    return torch.tensor(values.transpose(0, 3, 1, 2), dtype=torch.float32)


def compare(seen, name, ours, theirs):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    seen(f"CLIP: {name}", error)
    assert error < TOLERANCE, name


def forward(config, params, images, tokens, lengths):
    stage = make_stage(config)
    run = jax.jit(lambda p: (stage.embed_images(p, images), *stage.embed_texts_with_states(p, tokens, lengths)))
    return run(params)


@pytest.mark.parametrize("style", STYLES)
def test_embeddings_and_gradients(style, tmp_path, seen):
    model = reference(style)
    model.save_pretrained(tmp_path)
    hf_config = json.loads((tmp_path / "config.json").read_text())

    def convert(tensors):
        return openai_clip.convert_huggingface(StateDict(tensors, style), hf_config, {}, unit_norm=False)

    config, params = convert(read_tensors(tmp_path / "model.safetensors"))
    images, tokens, lengths = inputs(style)
    model.zero_grad()
    ids, seen_pixels = torch.tensor(tokens, dtype=torch.long), pixels(images)
    theirs = model(input_ids=ids, pixel_values=seen_pixels, return_loss=True)
    z_i, z_t, states = forward(config, params, images, tokens, lengths)
    compare(seen, "text states", states, theirs.text_model_output.last_hidden_state)
    compare(seen, "image embeddings", z_i, model.get_image_features(pixel_values=seen_pixels).pooler_output)
    compare(seen, "text embeddings", z_t, model.get_text_features(input_ids=ids).pooler_output)
    z_i, z_t = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z_i, z_t))
    compare(seen, "image embeddings of unit norm", z_i, theirs.image_embeds)
    compare(seen, "text embeddings of unit norm", z_t, theirs.text_embeds)
    compare(seen, "logits", np.exp(params["logit_scale"]) * z_i @ z_t.T, theirs.logits_per_image)

    stage = make_stage(config)
    batch = {"image": images, "tokens": tokens, "tokens_length": lengths}
    loss = jax.jit(jax.value_and_grad(lambda p: stage.loss(p, {}, batch, jax.random.key(0))[0]))
    value, gradients = loss(jax.tree.map(jnp.asarray, params))
    compare(seen, "loss", value, theirs.loss)
    theirs.loss.backward()
    # Converting only moves numbers about, and so carries gradients as it carries weights.
    _, expected = convert({name: p.grad for name, p in model.named_parameters()})
    gradients, expected = named_leaves(gradients), named_leaves(expected)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 0, name
        compare(seen, "gradients", gradients[name], gradient)


def openai_names(model):
    """The weights as OpenAI's code names and keeps them."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    renamed = {
        "visual.class_embedding": tensors.pop("vision_model.embeddings.class_embedding"),
        "visual.conv1.weight": tensors.pop("vision_model.embeddings.patch_embedding.weight"),
        "visual.positional_embedding": tensors.pop("vision_model.embeddings.position_embedding.weight"),
        "visual.proj": tensors.pop("visual_projection.weight").T.contiguous(),
        "token_embedding.weight": tensors.pop("text_model.embeddings.token_embedding.weight"),
        "positional_embedding": tensors.pop("text_model.embeddings.position_embedding.weight"),
        "text_projection": tensors.pop("text_projection.weight").T.contiguous(),
        "logit_scale": tensors.pop("logit_scale"),
    }
    for part in ("weight", "bias"):
        for block in [n.removesuffix(f".q_proj.{part}") for n in tensors if n.endswith(f".q_proj.{part}")]:
            qkv = [tensors.pop(f"{block}.{letter}_proj.{part}") for letter in "qkv"]
            tensors[f"{block}.in_proj_{part}"] = torch.cat(qkv)
    words = {
        "vision_model.encoder.layers": "visual.transformer.resblocks",
        "text_model.encoder.layers": "transformer.resblocks",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "text_model.final_layer_norm": "ln_final",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn": "attn",
        "fc1": "c_fc",
        "fc2": "c_proj",
    }
    for name, tensor in tensors.items():
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


class Node(torch.nn.Module):
    """A module with the parameters and buffers of a state dict, so that TorchScript can keep them."""

    def __init__(self, tensors):
        super().__init__()
        children = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                children.setdefault(first, {})[rest] = tensor
            elif tensor.is_floating_point():
                self.register_parameter(first, torch.nn.Parameter(tensor))
            else:
                self.register_buffer(first, tensor)
        for name, parts in children.items():
            self.add_module(name, Node(parts))

    def forward(self, x):
        return x


@pytest.mark.parametrize("kind", ["state dict", "state dict of PyTorch before 1.6", "archive"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_openai_form(kind, tmp_path, seen):
    model = reference("B/32")
    tensors = openai_names(model)
    path = tmp_path / "ViT.pt"
    if kind == "archive":
        sizes = {"input_resolution": 32, "context_length": CONTEXT, "vocab_size": END + 1}
        tensors |= {name: torch.tensor(value) for name, value in sizes.items()}
        torch.jit.script(Node(tensors)).save(str(path))
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization="before" not in kind)
        assert zipfile.is_zipfile(path) == ("before" not in kind)
    config, params = openai_clip.convert(StateDict(read_tensors(path), str(path)), head_channels=8, unit_norm=False)
    images, tokens, lengths = inputs("B/32")
    z_i, z_t, states = forward(config, params, images, tokens, lengths)
    text = model.text_model(input_ids=torch.tensor(tokens, dtype=torch.long))
    compare(seen, "OpenAI's form", z_i, model.get_image_features(pixel_values=pixels(images)).pooler_output)
    compare(seen, "OpenAI's form", z_t, model.text_projection(text.pooler_output))
    compare(seen, "OpenAI's form", states, text.last_hidden_state)


class Evil(torch.nn.Module):
    """Loading it by torch.jit.load runs its `__setstate__`, which fails."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.arange(6.0).reshape(2, 3))

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, True)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        assert False, "it was run"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_code_of_an_archive_is_not_run(tmp_path):
    torch.jit.script(Evil()).save(str(tmp_path / "evil.pt"))
    with pytest.raises(torch.jit.Error, match="it was run"):
        torch.jit.load(str(tmp_path / "evil.pt"))
    with pytest.raises(UserError, match="is not a state dict"):
        read_tensors(tmp_path / "evil.pt")


def test_half_precision_files(tmp_path):
    """Weights of 16 bits, as most are published, are the same numbers in float32."""
    model = reference("B/32")
    for dtype in (torch.float16, torch.bfloat16):
        tensors = {name: tensor.to(dtype) for name, tensor in openai_names(model).items()}
        torch.save(tensors, tmp_path / "ViT.pt")
        _, params = openai_clip.convert(StateDict(read_tensors(tmp_path / "ViT.pt"), "ViT.pt"), head_channels=8)
        expected = tensors["visual.proj"].float().numpy()
        np.testing.assert_array_equal(params["image"]["projection"]["kernel"], expected)


def test_two_halves(tmp_path, seen):
    """What a pipeline keeps in text_encoder/ and image_encoder/ is one CLIP, at 100 times the cosine."""
    style = "H/14"
    model = reference(style)
    text, vision = (copy.deepcopy(part) for part in (model.config.text_config, model.config.vision_config))
    text.projection_dim = vision.projection_dim = model.config.projection_dim
    halves = {
        "text": transformers.CLIPTextModelWithProjection(text),
        "image": transformers.CLIPVisionModelWithProjection(vision),
    }
    for name, half in halves.items():
        half.load_state_dict({k: v for k, v in model.state_dict().items() if k in half.state_dict()})
        half.save_pretrained(tmp_path / name)
    weights = {name: StateDict(read_tensors(tmp_path / name / "model.safetensors"), name) for name in halves}
    configs = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in halves}
    config, params = openai_clip.convert_towers(
        weights["text"], configs["text"], weights["image"], configs["image"], {}, unit_norm=False
    )
    images, tokens, lengths = inputs(style)
    z_i, z_t, _ = forward(config, params, images, tokens, lengths)
    ids = torch.tensor(tokens, dtype=torch.long)
    compare(seen, "two halves", z_i, model.get_image_features(pixel_values=pixels(images)).pooler_output)
    compare(seen, "two halves", z_t, model.get_text_features(input_ids=ids).pooler_output)
    np.testing.assert_allclose(np.exp(params["logit_scale"]), 100, rtol=1e-6)

    text = StateDict(read_tensors(tmp_path / "text" / "model.safetensors"), "text")
    config, params = openai_clip.convert_towers(text, configs["text"], None, {}, {}, unit_norm=False)
    assert config.model.image is None and params.keys() == {"text", "logit_scale"}
    alone, _ = jax.jit(make_stage(config).embed_texts_with_states)(params, tokens, lengths)
    np.testing.assert_allclose(alone, z_t, rtol=1e-6, atol=1e-6)


def odd_pictures():
    """Sizes smaller, larger, odd, and strips; smooth, noise, and the extremes, at which interpolation overshoots."""
    rng = np.random.default_rng(0)
    sizes = [(28, 28), (29, 28), (28, 31), (27, 27), (1, 60), (90, 1), (2, 113), (14, 15), (56, 57), (100, 33)]
    sizes += [(33, 100), (224, 224), (225, 300), (301, 224), (333, 500), (640, 479), (77, 76), (61, 59), (31, 87)]
    sizes += [(41, 40), (1, 1)]
    for n, (height, width) in enumerate(sizes):
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        phase = np.arange(height)[:, None, None] / 7 + np.arange(width)[:, None] / 5 + np.arange(3)
        waves = (127.5 + 127.5 * np.sin(phase)).astype(np.uint8)
        yield (noise, waves, np.where(noise > 127, 255, 0).astype(np.uint8))[n % 3]
    yield np.repeat(rng.integers(0, 256, (45, 64, 1), dtype=np.uint8), 3, axis=2)


@pytest.mark.parametrize("size", [28, 224])
def test_pictures_are_prepared_alike(size, seen):
    sides = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    processor = transformers.CLIPImageProcessorPil(**sides)
    for picture in odd_pictures():
        theirs = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"][0]
        ours = pixels(center_square(picture, size, "bicubic")[None])[0].numpy()
        difference = np.abs(ours - theirs) * np.array(openai_clip.STD).reshape(3, 1, 1) * 255  # in steps of 8 bits
        seen("CLIP: prepared pictures, in grey levels", difference.max())
        assert difference.max() < 1e-3, picture.shape


def test_command(tmp_path, seen, capsys):
    """The folder that transformers saves → a bundle that sees pictures and captions as transformers does."""
    merges = vocabularies.clip_merges(40)
    vocabulary = vocabularies.clip_vocabulary(merges)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    config = reference("H/14").config.to_dict()
    config["text_config"] |= dict(vocab_size=len(vocabulary), eos_token_id=len(vocabulary) - 1)
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(**config)).eval()
    model.save_pretrained(tmp_path / "source")
    sides = {"size": {"shortest_edge": 20}, "crop_size": {"height": 20, "width": 20}}
    processor = transformers.CLIPImageProcessorPil(image_mean=mean, image_std=std, **sides)
    processor.save_pretrained(tmp_path / "source")
    vocabularies.save_huggingface(tmp_path / "source", vocabulary, merges)
    assert command.main(["", "openai_clip", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 0
    count = sum(p.numel() for p in model.parameters())
    assert f"clip, {count:,} parameters" in capsys.readouterr().err

    bundle = load_bundle(str(tmp_path / "out"))
    m = bundle.config.model
    assert bundle.stage == "clip" and m.unit_norm and (m.mean, m.std) == (tuple(mean), tuple(std))
    texts = ["a photo of a corgi", "", "the red teapot " * 9]
    pictures = [picture for picture in odd_pictures() if min(picture.shape[:2]) > 1][:3]
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "source")
    their_tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**their_tokens, **processor(pictures, return_tensors="pt"))
    tokens, lengths = Tokenizer(bundle.tokenizer_bytes).encode(texts, m.text.context, ends=True)
    squares = np.stack([center_square(picture, m.image_size, m.resize) for picture in pictures])
    z_i, z_t, _ = forward(bundle.config, bundle.params, squares, tokens, lengths)
    compare(seen, "from files to embeddings", z_i, theirs.image_embeds)
    compare(seen, "from files to embeddings", z_t, theirs.text_embeds)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_open_clip(quick_gelu, tmp_path, seen):
    """A folder as open_clip stores it, with heads, mean and activation of its own."""
    open_clip = pytest.importorskip("open_clip")
    vision = dict(image_size=16, layers=2, width=24, patch_size=4, head_width=12)
    text = dict(context_length=CONTEXT, vocab_size=514, width=16, heads=2, layers=3)
    towers = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text} | ({"quick_gelu": True} if quick_gelu else {})
    torch.manual_seed(3)
    model = open_clip.model.CLIP(**towers).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
    about = {"model_cfg": towers, "preprocess_cfg": preprocess}
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(about))
    torch.save(model.state_dict(), tmp_path / "clip" / "open_clip_pytorch_model.bin")
    vocabularies.save_clip(tmp_path / "clip", [])
    command.main(["pretrained", "openai_clip", str(tmp_path / "clip"), "--out", str(tmp_path / "out")])

    bundle = load_bundle(tmp_path / "out")
    images = np.random.default_rng(5).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    unit = (images / 255 - np.array(mean)) / np.array(std)
    tokens, lengths = Tokenizer(bundle.tokenizer_bytes).encode(["a red corgi", "the café", "a"], CONTEXT, ends=True)
    ours = forward(bundle.config, bundle.params, images, tokens, lengths)
    with torch.no_grad():
        theirs = model.encode_image(torch.tensor(unit.transpose(0, 3, 1, 2), dtype=torch.float32), normalize=True)
        compare(seen, "open_clip's image embeddings", ours[0], theirs)
        theirs = model.encode_text(torch.tensor(tokens, dtype=torch.long), normalize=True)
        compare(seen, "open_clip's text embeddings", ours[1], theirs)
