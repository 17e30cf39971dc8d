"""Editing with random models: what must hold whatever they draw; and the command."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from shrink import compilation_cache, save_cascade, small_config, small_stage, tokenizer_bytes

from unclip_jax import __version__, edit, sample
from unclip_jax.bundle import save_bundle
from unclip_jax.cascade import Cascade, ddim_to_and_fro, slerp
from unclip_jax.data import embeddings
from unclip_jax.data.embeddings import Form, Provenance, Row
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.diffusion.schedule import make_schedule
from unclip_jax.errors import UserError
from unclip_jax.model import Model
from unclip_jax.paths import copy_folder, files_below, to_path, write_bytes
from unclip_jax.pictures import add_file, gif
from unclip_jax.stages import codes, make_stage
from unclip_jax.stages.base import draw
from unclip_jax.stages.conditions import Conditions

STEPS = 5
LONG = "a red " * 10  # more tokens than the shrunk CLIP reads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_cascade(tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="module")
def cascade(folder):
    return Cascade.load(str(folder))


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3)).astype(np.uint8)


def test_slerp_stays_on_the_arc():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    angle = np.arccos(a @ b)
    for theta in (0.0, 0.3, 1.0):
        point = slerp(a, b, theta)
        np.testing.assert_allclose(np.linalg.norm(point), 1)
        np.testing.assert_allclose(np.arccos(np.clip(point @ a, -1, 1)), theta * angle, atol=1e-7)
    np.testing.assert_allclose(slerp(a, a, 0.5), a)
    noise = rng.normal(size=(2, 4, 4, 3))
    np.testing.assert_allclose(slerp(*noise, 1.0), noise[1])


def test_without_noise_the_seed_does_not_matter_and_with_it_it_does(cascade, pictures):
    embeddings, x_T = cascade.encode(pictures, STEPS)
    draw = lambda seed, eta: cascade.redraw(embeddings, x_T, seed, eta, STEPS)["images"][0]  # noqa: E731
    np.testing.assert_array_equal(draw(0, 0.0), draw(1, 0.0))
    assert not np.array_equal(draw(0, 1.0), draw(1, 1.0))
    np.testing.assert_array_equal(draw(1, 1.0), draw(1, 1.0))


@pytest.mark.slow
def test_variations_differ_and_eta_never_compiles_anew(cascade, pictures):
    first = cascade.variations(pictures[0], 3, 1.0, 0, steps=STEPS)
    assert len({image.tobytes() for image in first["images"][0]}) == 3
    model = cascade.decoder.sampled_by(**ddim_to_and_fro(STEPS, 1000))
    before = model._sample.jitted()._cache_size()
    assert before
    cascade.variations(pictures[1], 3, 0.5, 1, steps=STEPS, guidance_scale=2.0)
    assert model._sample.jitted()._cache_size() == before


def test_interpolation_ends_at_both_pictures(cascade, pictures):
    embeddings, x_T = cascade.encode(pictures, STEPS)
    ends = cascade.redraw(embeddings, x_T, 0, steps=STEPS)["images"][0]
    path = cascade.interpolate(*pictures, 4, 0, steps=STEPS)
    np.testing.assert_allclose(path["images"][0][[0, -1]].astype(int), ends, atol=1)
    np.testing.assert_allclose(path["embeddings"][[0, -1]], embeddings, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(path["embeddings"], axis=1), 1, rtol=1e-5)
    one_noise = cascade.interpolate(pictures[0], pictures[0], 3, 0, inverted=False, steps=STEPS)["images"][0]
    np.testing.assert_array_equal(one_noise[0], one_noise[2])


def test_text_diff_starts_at_the_picture_and_heads_for_the_difference(cascade, pictures):
    embedding, _ = cascade.encode(pictures[:1], STEPS)
    path = cascade.text_diff(pictures[0], "a red apple", "a blue fox", 0.5, 3, 0, steps=STEPS)
    np.testing.assert_allclose(path["embeddings"][0], embedding[0], atol=1e-6)
    source, target = cascade.text_embeddings(["a red apple", "a blue fox"])
    direction = (target - source) / np.linalg.norm(target - source)
    angles = np.arccos(np.clip(path["embeddings"] @ direction, -1, 1))
    np.testing.assert_allclose(angles, angles[0] * np.array([1, 0.75, 0.5]), atol=1e-4)


def test_reconstructions_keep_so_many_components(cascade, pictures):
    z = cascade.image_embeddings(pictures[:1])[0]
    rng = np.random.default_rng(0)
    statistics = {"mean": rng.normal(size=8) / 3, "components": np.linalg.qr(rng.normal(size=(8, 8)))[0][:6]}
    found = cascade.reconstructions(pictures[0], statistics, (0, 3, 6), 0, steps=STEPS)
    assert [image.shape for image in found["images"]] == [(3, side, side, 3) for side in (8, 32, 128)]
    for count, row in zip((0, 3, 6), found["embeddings"], strict=True):
        kept = statistics["components"][:count]
        expected = statistics["mean"] + kept.T @ kept @ (z - statistics["mean"])
        np.testing.assert_allclose(row, expected / np.linalg.norm(expected), atol=1e-6)
    with pytest.raises(UserError, match="7 principal components: expected 0 to 6"):
        cascade.reconstructions(pictures[0], statistics, (7,), 0)


@pytest.mark.parametrize("side", [24, 64])
def test_inpainting_keeps_known_pixels_bit_for_bit(cascade, pictures, side):
    picture = np.random.default_rng(1).integers(0, 256, (side, side, 3)).astype(np.uint8)
    mask = np.zeros((side, side), bool)
    mask[side // 4 : side // 2, side // 3 :] = True
    drawn = cascade.inpaint(picture, mask, "a red apple", 2, 0)["images"][-1]
    final = drawn.shape[1]
    if side == final:
        np.testing.assert_array_equal(drawn[:, ~mask], np.stack([picture[~mask]] * 2))
    assert not np.array_equal(drawn[0], drawn[1])
    marked = np.asarray(Image.fromarray(mask).resize((final, final), Image.Resampling.NEAREST))
    assert (drawn[0] != drawn[1]).any(-1)[~np.roll(marked, 0)].sum() <= (drawn[0] != drawn[1]).any(-1).sum() * 0.2


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.ones((24, 24), bool), "marks all"),
        (np.zeros((24, 24), bool), "marks nothing"),
        (np.eye(12, dtype=bool), "the mask is 12x12 pixels, the picture 24x24"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(cascade, pictures, mask, says):
    with pytest.raises(UserError, match=says):
        cascade.inpaint(pictures[0], mask, "a red apple", 1, 0)


@pytest.mark.parametrize(("columns", "says"), [(slice(0, 12), "nothing"), (slice(12, 36), "all")])
def test_what_a_mask_marks_beside_the_square_does_not_count(cascade, pictures, columns, says):
    mask = np.zeros((24, 48), bool)
    mask[:, columns] = True
    with pytest.raises(UserError, match=f"marks {says} of the square in the picture's middle"):
        cascade.inpaint(np.concatenate([pictures[0], pictures[1]], axis=1), mask, "a red apple", 1, 0)


@pytest.mark.parametrize("columns", [slice(11, 20), slice(30, 37), slice(11, 12)])
def test_a_hole_that_reaches_beyond_the_square_is_refused(cascade, pictures, columns):
    """Columns 12 to 35 are seen."""
    mask = np.zeros((24, 48), bool)
    mask[3:5, columns] = mask[3:5, 20:24] = True
    with pytest.raises(UserError, match="marks pixels beside the square in the picture's middle"):
        cascade.inpaint(np.concatenate([pictures[0], pictures[1]], axis=1), mask, "a red apple", 1, 0)


def test_masks_may_be_transparent(tmp_path):
    white = np.zeros((4, 5, 4), np.uint8)
    white[..., 3] = 255
    white[1, 2] = 255
    holes = np.zeros((4, 5, 4), np.uint8)
    holes[..., 3] = 255
    holes[1, 2, 3] = 0
    for name, pixels in (("white", white), ("holes", holes)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        assert np.argwhere(edit._read_mask(str(tmp_path / f"{name}.png"))).tolist() == [[1, 2]]


def test_sdedit_starts_from_the_sketch_noised_as_far_as_was_said():
    """A network that takes what it sees for the picture leaves the noise in, so that it can be measured."""
    config = small_config("decoder").unlock()
    sketch = np.full((64, 8, 8, 3), 0.5, np.float32)
    for start, step in ((0.001, 0), (0.5, 489), (1.0, 999)):
        config.sampling.update(dict(steps="50", start=start, clip_x0=0.0))
        schedule = make_schedule("cosine", 1000)
        seen = []

        def network(x_t, t, seen=seen):
            jax.debug.callback(lambda x, t: seen.append((int(t[0]), np.asarray(x))), x_t, t)
            return x_t

        draw(config, network, sketch.shape, Conditions(sketch=sketch), jax.random.key(0))
        jax.effects_barrier()
        t, x_t = max(seen, key=lambda entry: entry[0])
        assert t == step
        np.testing.assert_allclose(x_t.mean(), 0.5 * schedule.sqrt_alpha_bars[step], atol=0.03)
        np.testing.assert_allclose(x_t.std(), schedule.sqrt_beta_bars[step], rtol=0.03)


def test_templates_average_the_embeddings_of_a_label(cascade, pictures):
    labels, templates = ["red apple", "blue fox"], ["a {}", "one {}"]
    each = [cascade.text_embeddings([template.replace("{}", label) for template in templates]) for label in labels]
    z_t = np.stack(each)
    z_t = z_t.mean(axis=1) / np.linalg.norm(z_t.mean(axis=1), axis=-1, keepdims=True)
    logits = np.exp(np.float64(cascade.clip.params["logit_scale"])) * (z_t @ cascade.image_embeddings(pictures[:1])[0])
    found = cascade.classify(pictures[0], labels, templates)
    np.testing.assert_allclose(found, np.exp(logits) / np.exp(logits).sum(), rtol=1e-4)


def test_probabilities_are_clips(cascade, pictures):
    labels = ["a red apple", "a blue fox", "one green tent"]
    probabilities = cascade.classify(pictures[0], labels)
    z_i, z_t = cascade.image_embeddings(pictures[:1])[0], cascade.text_embeddings(labels)
    logits = np.exp(np.float64(cascade.clip.params["logit_scale"])) * (z_t.astype(np.float64) @ z_i)
    np.testing.assert_allclose(probabilities, np.exp(logits) / np.exp(logits).sum(), rtol=1e-4)


def save(path, array, mode=None):
    Image.fromarray(array, mode).save(path)
    return str(path)


@pytest.fixture
def files(tmp_path, pictures):
    mask = np.zeros((24, 24), np.uint8)
    mask[4:12, 4:12] = 255
    return {
        "one": save(tmp_path / "one.png", pictures[0]),
        "two": save(tmp_path / "two.png", pictures[1]),
        "mask": save(tmp_path / "mask.png", mask),
        "small": save(tmp_path / "small.png", mask[:12, :12]),
        "text": str((tmp_path / "text.txt").write_text("no picture") and tmp_path / "text.txt"),
    }


def run(folder, out, command, *options):
    few = ["--steps=5"] * ("steps" in edit.COMMANDS.get(command, ()))
    with compilation_cache():
        return edit.main(["edit", command, "--bundle", str(folder), "--out", str(out), *few, *options])


@pytest.mark.parametrize(
    ("command", "options", "written"),
    [
        pytest.param(
            "variations",
            ["--image={one}", "-n", "2"],
            {"variations_one_0_0.png", "variations_one_0_1.png", "sheet.png"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "interpolate",
            ["--image={one}", "--image={two}", "-n", "3"],
            {f"interpolate_one_0_{i}.png" for i in range(3)} | {"sheet.png", "path.gif"},
            marks=pytest.mark.slow,
        ),
        (
            "inpaint",
            ["--image={one}", "--mask={mask}", "--prompt=a red apple", "--mask={mask}", "--prompt=a fox", "-n", "1"],
            {"inpaint_one_0_0.png", "sheet.png"},
        ),
    ],
)
def test_command_writes_pictures_and_a_sheet(folder, files, tmp_path, command, options, written):
    out = tmp_path / "out"
    assert run(folder, out, command, *(option.format(**files) for option in options)) == 0
    assert {path.name for path in out.iterdir()} == written
    with Image.open(out / "sheet.png") as sheet:
        about = json.loads(sheet.text["edit"])
    read = {name for name, default in edit.COMMANDS[command].items() if default is not None}
    assert set(about) == read | {"command", "bundle", "image", "sha256", "models", "version"}
    assert about["command"] == command and about["seed"] == 0 and about["version"] == __version__
    assert about["models"] == Cascade.load(str(folder)).identities()
    named = [*about["image"], *about.get("mask", [])]
    assert about["sha256"] == {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in named}
    with Image.open(out / f"{command}_one_0_0.png") as picture:
        assert json.loads(picture.text["edit"]) == about | {"index": 0}
    stored = {name: about[name] for name in ("bundle", "image", *read) if about[name] is not False}
    given = [(name, value) for name, values in stored.items() for value in np.atleast_1d(values).tolist()]
    again = [edit._flag(name) if value is True else f"{edit._flag(name)}={value}" for name, value in given]
    with compilation_cache():
        assert edit.main(["edit", command, *again, f"--out={tmp_path / 'again'}"]) == 0
    for name in written:
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize("drop_caption", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_glide_follows_sketches_and_is_guided_only_where_it_was_trained_for_it(tmp_path, files, drop_caption):
    stage, _, params = small_stage("glide")
    config = stage.config.copy_and_resolve_references().unlock()
    config.diffusion.drop_caption = drop_caption
    save_bundle(tmp_path / "glide", "glide", config.lock(), params, tokenizer_bytes(), "", {})  # alone
    options = [f"--image={files['one']}", "--prompt=a fox", "-n", "1"]
    assert run(tmp_path / "glide", tmp_path / "out", "sdedit", *options) == 0
    options = ["--prompt=a fox", "-n", "1", f"--out={tmp_path / 'drawn'}"]
    assert sample.main(["sample", f"--bundle={tmp_path / 'glide'}", *options]) == 0
    picture = tmp_path / "drawn" / "a_fox_0_0.png"
    assert sample.main(["sample", f"--again={picture}", f"--out={tmp_path / 'again'}"]) == 0
    np.testing.assert_array_equal(edit._read(str(tmp_path / "again" / picture.name)), edit._read(str(picture)))
    cascade = Cascade.load(str(tmp_path / "glide"))
    if drop_caption:
        assert cascade.generate(["a fox"], 0, 3.0)["images"][0].shape == (1, 8, 8, 3)
    else:
        with pytest.raises(UserError, match=r"guidance 3.0: this model was never trained without captions"):
            cascade.generate(["a fox"], 0, 3.0)


@pytest.mark.parametrize("command", sorted(edit.COMMANDS.keys() - {"inpaint", "sdedit"}))
def test_glide_has_no_embeddings_to_edit(tmp_path, files, command):
    stage, _, params = small_stage("glide")
    save_bundle(tmp_path / "glide" / "decoder", "glide", stage.config, params, tokenizer_bytes(), "", {})
    needed = {"text_diff": ["--after=a"], "reconstruct": ["--components=1"], "classify": ["--label=a"]}
    images = [f"--image={files[name]}" for name in ("one", "two")][: 1 + (command == "interpolate")]
    with pytest.raises(UserError, match=f"glide has no clip/, which {command} needs: give a cascade of unCLIP$"):
        run(tmp_path / "glide", tmp_path / "out", command, *images, *needed.get(command, []))


def inpainter(name, inpaint):
    """A random GLIDE; one that was trained to inpaint has the same weights, and others for the known pixels."""
    plain, _, params = small_stage(name)
    config = plain.config.copy_and_resolve_references().unlock()
    config.model.update(dict(inpaint=inpaint, image_size=32 if plain.config.model.factor else 8))
    stage = make_stage(config.lock())
    if inpaint:
        params = stage.adapt_params(params, plain.config)
        first = params["unet"]["conv_in"]
        kernel = first["kernel"].at[:, :, 3:7].set(0.3)
        params = params | {"unet": params["unet"] | {"conv_in": first | {"kernel": kernel}}}
    return Model(stage, params, Tokenizer(tokenizer_bytes()), "")


@pytest.mark.slow
def test_a_model_that_inpaints_is_told_of_the_known_pixels_or_not():
    """Untold, it draws what a model would that never could be told."""
    trained, plain = (
        Cascade(None, None, inpainter("glide", inpaint), [inpainter("glide_upsampler", inpaint)])
        for inpaint in (True, False)
    )
    picture = np.random.default_rng(1).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    mask = np.zeros((32, 32), bool)
    mask[8:24, 12:] = True
    drawn = [
        chain.inpaint(picture, mask, "a red apple", 2, 0, implicit=implicit)["images"]
        for chain, implicit in ((trained, False), (trained, True), (plain, False))
    ]
    for told, untold, never in zip(*drawn, strict=True):
        anew = mask[:: 32 // told.shape[1], :: 32 // told.shape[1]]
        for images in (untold, never):
            np.testing.assert_array_equal(images[:, ~anew], told[:, ~anew])
        np.testing.assert_allclose(untold.astype(int), never, atol=1)
        assert np.abs(told.astype(int) - untold)[:, anew].mean() > 5
    for images in drawn:
        np.testing.assert_array_equal(images[-1][:, ~mask], np.stack([picture[~mask]] * 2))


@pytest.mark.slow
def test_components_of_stored_embeddings_are_those_of_an_autoregressive_prior(folder, cascade, files, tmp_path):
    """Against NumPy's singular values; records that could not be read are left out."""
    z = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32) * np.arange(1, 9, dtype=np.float32)
    place = Provenance(cascade.clip.identity, "some:data", "image", "caption", "center")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "SHARD_RECORDS", 20)
        shards = embeddings.begin(tmp_path / "stored", place, Form("float32"), {"train": 50, "test": 3})
    for shard in shards[:-1]:  # the held-out one is not needed
        found = z[shard.start : shard.stop]
        rows = [Row(i, int(i < len(found) - 1), 0, 0, 8, 8) for i in range(len(found))]
        broken = np.full((1, 8), 1000, np.float32)
        embeddings.write(shard, np.concatenate([found[:-1], broken])[:, None], found, rows)
    kept = z[[i for i in range(50) if i not in (19, 39, 49)]].astype(np.float64)
    found = edit._components(cascade, str(tmp_path / "stored"))
    np.testing.assert_allclose(found["mean"], kept.mean(axis=0), atol=1e-9)
    true = np.linalg.svd(kept - kept.mean(axis=0))[2]
    np.testing.assert_allclose(np.abs(found["components"] @ true.T), np.eye(8), atol=1e-7)
    fitted = codes.fit(kept, kept[:, 0], 5, 0.0)
    np.testing.assert_allclose(found["components"][:5], fitted["components"], atol=1e-6)

    counts = [f"--components={count}" for count in (8, 0, 4)]
    options = [f"--image={files['one']}", f"--pca={tmp_path / 'stored'}", *counts]
    assert run(folder, tmp_path / "out", "reconstruct", *options) == 0
    with Image.open(tmp_path / "out" / "reconstruct_one_0_0.png") as picture:
        digests = json.loads(picture.text["edit"])["sha256"]
    numbers = found["mean"].tobytes() + found["components"].tobytes()
    assert digests[str(tmp_path / "stored")] == hashlib.sha256(numbers).hexdigest()
    whole = cascade.reconstructions(edit._read(files["one"]), found, [8], 0, steps=STEPS)["embeddings"][0]
    np.testing.assert_allclose(whole, cascade.image_embeddings([edit._read(files["one"])])[0], atol=1e-5)
    with pytest.raises(UserError, match="holds embeddings of clip"):
        next(embeddings.image_embeddings(tmp_path / "stored", "another"))


def test_classify_prints_labels_by_probability(folder, files, tmp_path, capsys):
    assert run(folder, tmp_path / "out", "classify", f"--image={files['one']}", "--label=a fox", "--label=a tent") == 0
    *lines, sheet = capsys.readouterr().out.splitlines()
    with Image.open(sheet) as picture:
        assert picture.size[0] > 256
    shares = [float(line.split("%")[0]) for line in lines]
    assert len(lines) == 2 and shares == sorted(shares, reverse=True)
    assert abs(sum(shares) - 100) < 0.02


def test_command_reads_and_writes_a_bucket(folder, files, bucket, tmp_path, capsys):
    """Cascade and picture from there: the same sheet and words."""
    copy_folder(folder, to_path(bucket) / "cascade", "")
    write_bytes(to_path(bucket) / "one.png", Path(files["one"]).read_bytes())
    found = []
    for cascade, place in ((folder, tmp_path), (f"{bucket}/cascade", to_path(bucket))):
        options = ["classify", f"--image={place / 'one.png'}", "--label=a fox", "--label=a tent"]
        assert run(cascade, place / "out", *options) == 0
        *lines, sheet = capsys.readouterr().out.splitlines()
        assert sheet == str(place / "out" / "sheet.png") and files_below(place / "out") == ["sheet.png"]
        found.append((lines, edit._read(sheet)))
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])
    with pytest.raises(UserError, match=r"no picture at gs://.*/two.png"):
        run(f"{bucket}/cascade", bucket, "classify", f"--image={bucket}/two.png", "--label=a fox")
    with pytest.raises(UserError, match=r"no bundle at gs://.*/nowhere"):
        run(f"{bucket}/nowhere", bucket, "classify", f"--image={bucket}/one.png", "--label=a fox")
    add_file(to_path(bucket) / "path.gif", gif(np.stack([found[0][1]] * 2)))
    assert edit._read(f"{bucket}/path.gif").shape == found[0][1].shape


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("variations", ["--image={one}", "--image={two}"], "takes 1 --image, not 2"),
        ("interpolate", ["--image={one}"], "takes 2 --image, not 1"),
        ("variations", ["--image={one}x"], "no picture at"),
        ("variations", ["--image={text}"], "not a picture that can be read"),
        ("variations", ["--image={one}", "-n", "0"], "--n: '0': expected a whole number from 1 to 100,000"),
        ("variations", ["--image={one}", "--eta", "2"], "--eta: '2': expected a number from 0 to 1"),
        ("text_diff", ["--image={one}", "--before=a fox"], "text_diff needs --after"),
        ("text_diff", ["--image={one}", "--before=a fox", "--after=a fox"], "'a fox' and 'a fox' are the same"),
        ("variations", ["--image={one}", "--steps=1001"], "1001 steps of DDIM: expected 3 to 1000"),
        ("variations", ["--image={one}", "--steps=2"], "2 steps of DDIM: expected 3 to 1000"),
        ("variations", ["--image={one}", "--guidance=nan"], "--guidance: 'nan': expected a finite number"),
        ("variations", ["--image={one}", "--seed=-1"], "--seed: '-1': expected a whole number"),
        ("inpaint", ["--image={one}", "--mask={mask}", "--prompt=a fox", "--guidance=inf"], "'inf': expected a finite"),
        ("classify", ["--image={one}", "--label=a fox", "--label=a fox"], "are the same to this CLIP"),
        ("classify", ["--image={one}", "--label=a fox", "--template=a photo"], "expected {} in it"),
        ("text_diff", ["--image={one}", "--before=a", "--after=b", "--theta=-1"], "--theta: '-1': expected"),
        ("inpaint", ["--image={one}", "--prompt=a fox"], "inpaint needs --mask"),
        ("inpaint", ["--image={one}", "--mask={mask}", "--prompt=a", "--prompt=b"], "1 masks and 2 prompts"),
        ("inpaint", ["--image={one}", "--mask={small}", "--prompt=a fox"], "the mask is 12x12 pixels"),
        ("inpaint", ["--image={one}", "--mask={mask}", "--prompt="], "the prompt is empty"),
        ("sdedit", ["--image={one}"], "sdedit needs --prompt"),
        ("classify", ["--image={one}"], "classify needs --label"),
        ("blur", ["--image={one}"], "invalid choice: 'blur'"),
        ("variations", ["--image={one}", "--theta=0.4"], "^--theta is of text_diff, not of variations$"),
        ("variations", ["--image={one}", "--implicit"], "^--implicit is of inpaint, not of variations$"),
        ("classify", ["--image={one}", "--label=a", "-n=2"], "--n is of variations, .* and sdedit, not of classify"),
        ("sdedit", ["--image={one}", "--prompt=a", "--steps=5"], "--steps is of variations, .*, not of sdedit"),
        ("sdedit", ["--image={one}", "--prompt=a", "--prompt=b"], "sdedit takes 1 --prompt, not 2"),
        ("variations", ["--image={one}", "--steps=1"], "1 steps of DDIM: expected 3 to 1000"),
        ("classify", ["--image={one}", f"--label={LONG} fox", f"--label={LONG} tent"], "tokens: CLIP reads 10; "),
        ("text_diff", ["--image={one}", f"--before={LONG} fox", "--after=a tent"], "tokens: CLIP reads 10; shorten"),
        ("text_diff", ["--image={one}", f"--after={LONG} tent"], "tokens: CLIP reads 10; shorten it"),
        ("text_diff", ["--image={one}", "--after= "], "the caption is empty"),
        ("classify", ["--image={one}", "--label=", "--label=a fox"], "the caption is empty"),
        ("classify", ["--image={one}", "--label=a \udcff fox"], r"caption 'a \\udcff fox' is not text in UTF-8"),
        ("sdedit", ["--image={one}", "--prompt=a \udcff fox"], r"prompt 'a \\udcff fox' is not text in UTF-8"),
        ("inpaint", ["--image={one}", *(f"--mask={{{m}}}" for m in ("mask", "small")), "--prompt=a", "--prompt=b"],
         "the mask is 12x12 pixels"),
        ("reconstruct", ["--image={one}", "--components=2"], "needs principal components: name by --pca"),
        ("reconstruct", ["--image={one}", "--components=2", "--pca={one}x"], "no bundle at"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(folder, files, tmp_path, command, options, says):
    with pytest.raises(UserError, match=says) as caught:
        run(folder, tmp_path / "out", command, *(option.format(**files) for option in options))
    assert "\n" not in str(caught.value)


def test_odd_kinds_of_pictures_are_read(tmp_path):
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    grey = edit._read(save(tmp_path / "grey.png", ramp))
    deep = edit._read(save(tmp_path / "deep.png", ramp.astype(np.uint16) * 256))
    clear = edit._read(save(tmp_path / "clear.png", np.dstack([ramp, ramp, ramp, 0 * ramp])))
    np.testing.assert_array_equal(grey, np.stack([ramp] * 3, -1))
    np.testing.assert_array_equal(deep, grey)
    assert (clear == 255).all()
