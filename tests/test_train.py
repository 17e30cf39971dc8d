"""Whole runs of `train` on a folder of twelve pictures: what they write, stop, resume, refuse and skip."""

import json
import os
import signal
import sys
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from shrink import (
    CAPTIONS,
    compilation_cache,
    leaves,
    random_params,
    save_pictures,
    small_config,
    small_stage,
    tokenizer_bytes,
)

from unclip_jax import cli, train
from unclip_jax.bundle import load_bundle, save_bundle
from unclip_jax.data import splits
from unclip_jax.data.tokenizer import train_tokenizer
from unclip_jax.embed import embed_dataset
from unclip_jax.errors import UserError
from unclip_jax.stages import make_stage
from unclip_jax.stages.clip import Clip
from unclip_jax.stages.prior_ar import PriorAR
from unclip_jax.training.sharding import make_mesh

STEPS = 2
PACKAGE = os.path.dirname(train.__file__)


def config_of(name, folder, steps=STEPS, **sections):
    config = small_config(name).unlock()
    config.data.update(dict(source=f"folder:{folder}", threads=1))
    config.train.update(dict(steps=steps, checkpoint_every=steps, sample_every=1000))
    if "unet" in config.model:
        config.model.unet.channel_mult = (1,)  # half the compilation
        if config.model.unet.get("attention"):
            config.model.unet.attention = (1,)
    for section, values in sections.items():
        config[section].update(values)
    return config.lock()


class Reads:
    """Notes which keys of a config the package's own code reads: as an attribute, or handing on a section as `**`.

    Reads by a name in a variable, as checks and copies do, are not counted.
    """

    def __init__(self, patch, config):
        self.unread, self._names = set(leaves(config)), {}
        self._learn(config, "")
        get, keys = ConfigDict.__getattr__, ConfigDict.keys

        def noting_get(section, name):
            self._note(section, [name])
            return get(section, name)

        def noting_keys(section):
            self._note(section, keys(section))
            return keys(section)

        patch.setattr(ConfigDict, "__getattr__", noting_get)
        patch.setattr(ConfigDict, "keys", noting_keys)

    def _learn(self, section, prefix):
        self._names[id(section)] = prefix
        for name, value in section.items():
            if isinstance(value, ConfigDict):
                self._learn(value, f"{prefix}{name}.")

    def _note(self, section, names):
        if sys._getframe(2).f_code.co_filename.startswith(PACKAGE) and id(section) in self._names:
            self.unread -= {self._names[id(section)] + name for name in names}


@pytest.fixture(scope="module", autouse=True)
def cache():
    with compilation_cache():
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return save_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """The same pictures, and one that is cut short."""
    folder = save_pictures(tmp_path_factory.mktemp("data") / "spoiled")
    whole = (folder / "05.png").read_bytes()
    (folder / "05.png").write_bytes(whole[:40])
    return folder


def save_glide(folder):
    """A random bundle of GLIDE's base, with a tokenizer of more captions than the pictures have."""
    config = config_of("glide", "elsewhere")
    save_bundle(folder, "glide", config, random_params(make_stage(config)), tokenizer_bytes(), "", {})
    return str(folder)


class Runs(dict):
    """Each stage trained two steps, when it is first asked for. The decoder is given no CLIP and trains its own; the
    diffusion prior takes that one. GLIDE goes on from a random bundle and learns nothing, as it was and to inpaint.

    On one device: of arrays on several, Orbax cuts a slice for each, which takes longer than the training.
    """

    def __init__(self, root, pictures, spoiled):
        super().__init__()
        self._root, self._pictures, self._spoiled = root, pictures, spoiled

    def __missing__(self, name):
        config = self._config(name)
        clip_config = config_of("clip", "elsewhere")
        with pytest.MonkeyPatch.context() as patch:
            load = cli.load_config
            patch.setattr(cli, "load_config", lambda spec: clip_config if spec == "clip.py" else load(spec))
            patch.setattr(train, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
            reads = Reads(patch, config)
            report = train.run(config, str(self._root / name))
        self[name] = SimpleNamespace(config=config, folder=self._root / name, report=report, unread=reads.unread)
        return self[name]

    def _config(self, name):
        if name == "decoder":
            return config_of(name, self._pictures, clip=dict(config="clip.py"))
        if name == "prior_diffusion":
            return config_of(name, self._spoiled, clip=dict(bundle=str(self["decoder"].folder / "clip" / "bundle")))
        if name == "prior_ar":
            return config_of(name, self._pictures, clip=dict(bundle=str(self["clip"].folder / "bundle")))
        if name == "upsampler_256":
            return config_of(name, self._pictures, train=dict(sample_every=1))
        if name == "clip":
            return config_of(name, self._pictures)
        origin = self._root / "origin"
        start = dict(init=dict(bundle=str(origin) if origin.exists() else save_glide(origin)))
        more = dict(model=dict(inpaint=True)) if name == "glide_inpaint" else {}
        return config_of("glide", self._pictures, **start, optim=dict(learning_rate=0.0), **more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pictures, spoiled):
    return Runs(tmp_path_factory.mktemp("runs"), pictures, spoiled)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("prior_ar", "glide", "glide_inpaint")]
STAGES = pytest.mark.parametrize("name", ["clip", "prior_diffusion", "decoder", "upsampler_256", *SLOW])


@STAGES
def test_run_leaves_metrics_checkpoint_and_bundle(runs, name):
    run = runs[name]
    log = lines(run.folder / "metrics.jsonl")
    assert [line["step"] for line in log] == [1, 2]
    for line in log:
        assert np.isfinite([line["loss"], line["grad_norm"], line["images_per_second"]]).all() and line["skipped"] == 0
    assert (run.folder / "checkpoints" / "2").is_dir()
    evaluation = lines(run.folder / "evaluation.jsonl")[-1]
    assert evaluation == {"step": 2} | run.report["metrics"] and np.isfinite(list(evaluation.values())).all()
    assert len(run.report["sha256"]) == 64

    bundle = load_bundle(str(run.folder / "bundle"))
    assert bundle.stage == run.config.stage and bundle.config.to_dict() == run.config.to_dict()
    own = run.folder / "tokenizer.model"
    assert bundle.tokenizer_bytes == (own.read_bytes() if own.exists() else None)
    assert own.exists() == (name != "upsampler_256")


@STAGES
def test_every_key_of_the_config_is_read(runs, name):
    config = runs[name].config
    # CLIP draws nothing; rounding is a cascade's, and an upsampler that reads no captions has no text path.
    text = {"model.text.context", "model.text.depth", "model.text.vocab_size", "sampling.guidance_scale"}
    idle = {"clip": {"train.draw_size"}, "upsampler_256": {"model.round_low_res"} | text}
    idle = idle.get(name, set()) | {"train.inception", "train.reference"}  # which no metric asks for
    idle |= {"init.model"}  # read on the command line
    idle |= {"sampling.eta"} if name == "prior_diffusion" else set()  # which is DDIM's
    if "clip" in config and config.clip.bundle:
        idle |= {"clip.config"}
    assert runs[name].unread == idle


@pytest.mark.slow
def test_glide_goes_on_from_a_bundle_with_its_tokenizer(runs):
    """At a learning rate of zero a run's average is what it started from."""
    origin = load_bundle(runs["glide"].config.init.bundle)
    plain, inpaint = (load_bundle(str(runs[name].folder / "bundle")) for name in ("glide", "glide_inpaint"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), plain.params, origin.params)
    kernel = inpaint.params["unet"]["conv_in"].pop("kernel")
    before = origin.params["unet"]["conv_in"].pop("kernel")
    np.testing.assert_allclose(kernel, np.pad(before, ((0, 0), (0, 0), (0, 4), (0, 0))), rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), inpaint.params, origin.params)
    assert plain.tokenizer_bytes == inpaint.tokenizer_bytes == origin.tokenizer_bytes
    assert train_tokenizer(CAPTIONS[:12], 512).model_bytes != origin.tokenizer_bytes, "the pictures' own is another"


@pytest.mark.slow
def test_inpainting_begins_with_the_loss_of_the_model_it_goes_on_from(runs):
    """Whatever is known, since its weights are zero."""
    plain, inpaint = (lines(runs[name].folder / "metrics.jsonl") for name in ("glide", "glide_inpaint"))
    np.testing.assert_allclose([line["loss"] for line in inpaint], [line["loss"] for line in plain], rtol=1e-5)


def test_both_upsamplers_have_the_same_keys():
    assert leaves(small_config("upsampler_256")).keys() == leaves(small_config("upsampler_1024")).keys()


def test_decoder_without_a_clip_trains_its_own_on_its_data(runs):
    clip = load_bundle(str(runs["decoder"].folder / "clip" / "bundle"))
    assert clip.stage == "clip" and clip.config.data.source == runs["decoder"].config.data.source
    for name in ("decoder", "prior_diffusion"):
        assert load_bundle(str(runs[name].folder / "bundle")).clip_identity == clip.identity


@pytest.mark.slow
def test_what_a_stage_prepares_is_stored_untrained_and_not_done_again(runs, monkeypatch):
    import orbax.checkpoint as ocp

    run = runs["prior_ar"]
    step = run.folder / "checkpoints" / "2"
    stored = [ocp.StandardCheckpointer().restore(step / name)["fixed"] for name in ("params", "ema")]
    bundle = load_bundle(str(run.folder / "bundle")).params["fixed"]
    assert np.linalg.norm(bundle["mean"]) > 0.1, "found in the data: it starts as zero"
    for found in (*stored, bundle):
        jax.tree.map(np.testing.assert_array_equal, found, bundle)

    def again(*_):
        raise AssertionError("prepared a second time")

    monkeypatch.setattr(PriorAR, "prepare", again)
    monkeypatch.setattr(train, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
    assert train.run(run.config, str(run.folder))["sha256"] == run.report["sha256"]
    with pytest.raises(AssertionError, match="prepared a second time"):
        train.run(run.config, str(run.folder) + "_afresh")


def test_pictures_are_drawn_on_the_way(runs):
    folder = runs["upsampler_256"].folder
    assert [line["step"] for line in lines(folder / "evaluation.jsonl")] == [1, 2]
    drawn = sorted((folder / "samples").iterdir())
    assert [path.name for path in drawn] == ["step_00000001.png", "step_00000001_raw.png", "step_00000002.png"]
    with Image.open(drawn[0]) as picture:
        assert picture.size[1] > 3 * 16  # the drawn, the interpolated and the true one
    assert not (runs["clip"].folder / "samples").exists()


def test_a_run_that_is_judged_by_few_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "HeldOut", lambda *_: pytest.fail("ends here"))
    for few, held_out in ((True, 7), (False, 8)):
        config = config_of("clip", save_pictures(tmp_path / str(held_out) / "pictures"))
        monkeypatch.setattr(splits, "held_out", lambda draws, held_out=held_out: np.arange(held_out))
        with pytest.raises(pytest.fail.Exception, match="ends here"):
            train.run(config, str(tmp_path / str(held_out) / "run"))
        said = capsys.readouterr().err
        assert ("only 7 example(s) are held out" in said) == ("are held out" in said) == few


def test_unreadable_pictures_are_counted(runs):
    assert lines(runs["prior_diffusion"].folder / "metrics.jsonl")[-1]["records_skipped"] > 0
    assert lines(runs["clip"].folder / "metrics.jsonl")[-1]["records_skipped"] == 0


@pytest.mark.slow
def test_embeddings_made_once_train_the_same_model(runs, tmp_path, monkeypatch, spoiled):
    """The same losses and evaluation, though CLIP does not run and a picture is spoiled."""
    run, folder = runs["prior_diffusion"], tmp_path / "embeddings"
    embed_dataset(run.config, folder, 0, 1, "float32", 1)
    given = dict(clip=dict(bundle=run.config.clip.bundle), data=dict(embeddings=str(folder)))
    config = config_of("prior_diffusion", spoiled, **given)
    for tower in ("embed_images", "embed_texts"):
        monkeypatch.setattr(Clip, tower, lambda *_: pytest.fail("CLIP must not run"))
    monkeypatch.setattr(train, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))
    report = train.run(config, str(tmp_path / "run"))
    one, other = (lines(place / "metrics.jsonl") for place in (run.folder, tmp_path / "run"))
    np.testing.assert_allclose([line["loss"] for line in other], [line["loss"] for line in one], rtol=1e-6)
    assert other[-1]["records_skipped"] > 0
    assert report["metrics"] == pytest.approx(run.report["metrics"], abs=1e-4)

    stage, _, params = small_stage("clip")
    save_bundle(tmp_path / "clip", "clip", stage.config, params, tokenizer_bytes(), "", {})
    config = config_of("prior_diffusion", spoiled, **given | dict(clip=dict(bundle=str(tmp_path / "clip"))))
    with pytest.raises(UserError, match="holds embeddings of clip"):
        train.run(config, str(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()


def test_the_bundle_holds_the_average_not_the_last_parameters(runs, tmp_path):
    import orbax.checkpoint as ocp

    stored = {
        name: ocp.StandardCheckpointer().restore(runs["clip"].folder / "checkpoints" / "2" / name)
        for name in ("params", "ema")
    }
    bundle = load_bundle(str(runs["clip"].folder / "bundle")).params["logit_scale"]
    np.testing.assert_array_equal(bundle, stored["ema"]["logit_scale"])
    assert bundle != stored["params"]["logit_scale"]


def config_file(tmp_path, config):
    """A file that --config can name, holding `config`."""
    (tmp_path / "small.py").write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({config.to_dict()!r})\n"
    )
    return f"--config={tmp_path / 'small.py'}"


def test_stopped_and_resumed_is_the_same_run(tmp_path, monkeypatch, capsys, pictures):
    """Told to stop in its second step of four, then run to the end by the same command; its clock runs out at once."""
    small = config_of("clip", pictures, steps=4).unlock()
    small.train.update(dict(checkpoint_every=100, checkpoint_minutes=1e-9))
    config = config_file(tmp_path, small)
    assert train.main(["train", config, f"--workdir={tmp_path / 'straight'}"]) == 0
    steps = {path.name for path in (tmp_path / "straight" / "checkpoints").iterdir()}
    assert steps == {"2", "4"}, "asked after the first step, answered after the second"
    straight = capsys.readouterr().out

    original, calls = train.global_batch, []

    def interrupting(rows, mesh):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(rows, mesh)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, "global_batch", interrupting)
    command = ["train", config, f"--workdir={tmp_path / 'stopped'}"]
    assert train.main(command) == 143, "not finished, so that a cluster starts it again"
    assert "stopped at step 2 of 4" in capsys.readouterr().err
    assert not (tmp_path / "stopped" / "bundle").exists()
    assert signal.getsignal(signal.SIGTERM) == handler
    stored = f"--config={tmp_path / 'stopped' / 'config.json'}"
    assert train.main(["train", stored, f"--workdir={tmp_path / 'stopped'}"]) == 0
    assert len(calls) == 4, "two steps before the stop, two after it"

    resumed = capsys.readouterr().out
    assert resumed == straight and resumed.startswith("state sha256 ")
    losses = [[(line["step"], line["loss"]) for line in lines(tmp_path / run / "metrics.jsonl")]
              for run in ("straight", "stopped")]  # fmt: skip
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [1, 2, 3, 4]
    identities = [load_bundle(str(tmp_path / run / "bundle")).identity for run in ("straight", "stopped")]
    assert identities[0] == identities[1]


def test_a_second_signal_acts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with train._Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert train.exit_status(stop.asked) == 130
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def refused(tmp_path, config, says):
    """`config` is refused in one line, before anything is trained or saved."""
    with pytest.raises(UserError, match=says) as caught:
        train.run(config, str(tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "clip").exists()


def test_decoder_needs_a_clip_that_is_one(tmp_path, pictures):
    stage, _, params = small_stage("decoder")
    save_bundle(tmp_path / "other", "decoder", stage.config, params, tokenizer_bytes(), "", {})
    config = config_of("decoder", pictures, clip=dict(bundle=str(tmp_path / "other")))
    refused(tmp_path, config, "holds a model of stage 'decoder', not a CLIP")
    config = config_of("decoder", pictures, clip=dict(bundle=str(tmp_path / "nothing")))
    refused(tmp_path, config, "no bundle at")
    config = config_of("decoder", pictures, clip=dict(bundle="", config=""))
    refused(tmp_path, config, "clip.bundle is empty")


def test_decoder_needs_a_clip_of_its_own_size(tmp_path, pictures):
    config = small_config("clip").unlock()
    config.model.dim = 16
    save_bundle(tmp_path / "clip", "clip", config, random_params(make_stage(config)), tokenizer_bytes(), "", {})
    config = config_of("decoder", pictures, clip=dict(bundle=str(tmp_path / "clip")))
    refused(tmp_path, config, "embeddings of 8 numbers, but its CLIP makes 16")


def test_glide_goes_on_from_its_own_kind_alone(tmp_path, pictures):
    stage, _, params = small_stage("decoder")
    save_bundle(tmp_path / "other", "decoder", stage.config, params, tokenizer_bytes(), "", {})
    origin = save_glide(tmp_path / "run" / "bundle")

    def config(bundle, **sections):
        return config_of("glide", pictures, init=dict(bundle=str(bundle)), **sections)

    refused(tmp_path, config(tmp_path / "other"), "holds a model of stage 'decoder', not 'glide'")
    refused(tmp_path, config(tmp_path / "nothing"), "no bundle at")
    refused(tmp_path, config(origin), "of this same workdir")
    origin = save_glide(tmp_path / "origin")
    wider = dict(text=dict(width=16))
    refused(tmp_path, config(origin, model=wider), r"model\.text\.width is 16 in the config, 8 in init\.bundle")
    another = tmp_path / "another.model"
    another.write_bytes(train_tokenizer(CAPTIONS[:12], 512).model_bytes)
    refused(tmp_path, config(origin, data=dict(tokenizer=str(another))), "data.tokenizer is set")
    another.rename(tmp_path / "run" / "tokenizer.model")
    refused(tmp_path, config(origin), "another tokenizer than init.bundle's")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(train=dict(batch_size=20)), "train.batch_size=20 cannot be split evenly"),
        (dict(model=dict(embedding_dim=16)), "embeddings of 16 numbers, but its CLIP makes 8"),
        (dict(optim=dict(schedule="cosin")), "optim.schedule is 'cosin'"),
        (dict(diffusion=dict(schedule="cosin")), "diffusion.schedule is 'cosin'"),
        (dict(diffusion=dict(predicts="eps")), "snr_clip weighs errors of x0"),
        (dict(diffusion=dict(predicts="v")), "diffusion.predicts is 'v'"),
        (dict(sampling=dict(steps="ddim64")), "no integer stride takes 64"),
        (dict(sampling=dict(sampler="dpm")), "sampling.sampler is 'dpm'"),
        (dict(mesh=dict(fsdp=3)), "do not cover 8"),
        (dict(data=dict(crop="random")), "data.crop is 'random'"),
        (dict(data=dict(min_side=-1)), "data.min_side is -1: expected a whole number from 0"),
        (dict(data=dict(max_aspect=0.5)), "data.max_aspect is 0.5: expected at least 1, or 0"),
        (dict(data=dict(embeddings="DIR")), "data.embeddings is set, but not the CLIP that made them"),
        (dict(data=dict(tokenizer="missing.model")), "missing.model does not exist"),
        (dict(data=dict(source="folder:/nowhere")), "no folder /nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_refused_before_a_clip_is_trained(tmp_path, monkeypatch, pictures, changes, says):
    clip_config = config_of("clip", pictures)
    config = config_of("decoder", pictures, **({"clip": dict(config="clip.py")} | changes))
    load = cli.load_config
    monkeypatch.setattr(cli, "load_config", lambda spec: clip_config if spec == "clip.py" else load(spec))
    refused(tmp_path, config, says)


def test_a_folder_without_one_readable_picture_is_refused(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
        (tmp_path / f"{name}.txt").write_text("a red apple")
    refused(tmp_path, config_of("clip", tmp_path), "none of 1000 records could be read.*: it is no picture of a known")


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (dict(min_side=25), "its shorter side has 24 pixels, less than data.min_side=25"),
        (dict(max_aspect=1.5), "it has 48 by 24 pixels, beyond data.max_aspect=1.5"),
    ],
)
def test_pictures_outside_the_configs_limits_are_not_trained_on(tmp_path, limits, says):
    for name in "abc":
        Image.new("RGB", (48, 24)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a red apple")
    refused(tmp_path, config_of("clip", tmp_path, data=limits), says)
