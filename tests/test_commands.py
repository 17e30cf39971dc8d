"""Every command: what it refuses, in one line and before any long work, and what `sample` leaves on the disk."""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shrink import compilation_cache, save_cascade, save_pictures

from unclip_jax import __version__, cli, model, pictures, plan, quickstart, sample, train
from unclip_jax.errors import UserError

ROOT = Path(__file__).parent.parent
CLIP = "--config=configs/clip.py:tiny"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders and files that commands are pointed at: {name} in an argument stands for one of them."""
    root = tmp_path_factory.mktemp("places")
    pictures = save_pictures(root / "pictures", 3)
    (root / "file").write_text("not a folder")
    (root / "own.json").write_text('{"config": {"stage": "my_own"}}')
    (root / "uncaptioned").mkdir()
    (root / "uncaptioned" / "a.png").write_bytes((pictures / "00.png").read_bytes())
    (root / "empty").mkdir()
    return {path.name: str(path) for path in root.iterdir()} | {"new": str(root / "new"), "root": str(root)}


TRAIN, SAMPLE = [CLIP, "--workdir={new}"], ["--bundle={empty}", "--prompt=x"]
REFUSED = [
    (train, [CLIP], "no --workdir"),
    (train, ["--workdir={new}"], "no config"),
    (train, [CLIP, "--workdir={file}"], "workdir .*file is a file"),
    (train, [CLIP, "--workdir={file}/below"], "below is a file or lies below one"),
    (train, [*TRAIN, "--config.optim.learning_rat=1"], "nearest is --config.optim.learning_rate"),
    (train, [*TRAIN, "--config.trian.steps=1"], "no key 'trian'; the nearest is --config.train.steps"),
    (train, [*TRAIN, "--config.train.steps=many"], "train.steps"),
    (train, [*TRAIN, "--config.train.steps=0"], "train.steps is 0"),
    (train, [*TRAIN, "--profile=-1"], "--profile=-1: expected a number of steps, 1 or more, or 0 for no trace"),
    (train, [*TRAIN, "--config.dtype=float16"], "dtype is 'float16'"),
    (train, [*TRAIN, "--config.model.text.heads=3"], "must be a multiple of model.text.heads=3"),
    (train, [*TRAIN, "--workdri=x"], "workdri"),
    (train, [*TRAIN, "more"], "unexpected argument 'more'"),
    (train, ["--config=configs/clop.py:tiny", "--workdir={new}"], "no config file configs/clop.py"),
    (train, ["--config=s3://bucket/config.json", "--workdir={new}"], "expected a place on a disk, or gs://"),
    (train, ["--config=gs:/bucket/config.json", "--workdir={new}"], "expected a place on a disk"),
    (train, ["--config=configs/clip.py:huge", "--workdir={new}"], "size 'huge': expected one of paper, small, tiny"),
    (train, ["--config=configs/clip.py:paper", "--workdir={new}"], "data.source is empty"),
    (train, [*TRAIN, "--config.mesh.fsdp=3"], "do not cover 8"),
    (train, [*TRAIN, "--config.train.batch_size=100", "--config.data.source=folder:{pictures}"], "batch_size=100"),
    (train, [*TRAIN, "--config.data.source=folder:{root}/nowhere"], "no folder"),
    (train, [*TRAIN, "--config.data.source=folder:{empty}"], "has no pictures"),
    (train, [*TRAIN, "--config.data.source=folder:{uncaptioned}"], "1 pictures but no captions"),
    (train, [*TRAIN, "--config.data.source=zip:{pictures}"], "expected tfds:NAME, folder:PATH, tars:PATTERN"),
    (train, [*TRAIN, "--config.data.source=tfds:emoji_scenes/single_65"], "no config 'single_65': it has"),
    (train, [*TRAIN, "--config.data.source=tfds:emoji_scene", "--config.data.data_dir={empty}"], "emoji_scenes"),
    (train, ["--config=configs/decoder.py:tiny", "--workdir={new}", "--config.clip.bundle={empty}"], "not a bundle"),
    (
        train,
        ["--config=configs/upsampler_256.py:tiny", "--workdir={new}", "--config.model.patch=7"],
        "model.patch is 7",
    ),
    (
        train,
        ["--config=configs/upsampler_256.py:tiny", "--workdir={new}", "--config.model.last_step=True"],
        "model.last_step is true",
    ),
    (train, [*TRAIN, "--config.model.resize=cubic"], "model.resize is 'cubic': expected one of area, bicubic"),
    (train, [*TRAIN, "--config.model.image.timesteps=9"], "no model.noise_schedule"),
    (
        train,
        ["--config=configs/clip_noised.py:tiny", "--workdir={new}", "--config.model.noise_schedule=sine"],
        "noise_schedule is 'sine': expected one of",
    ),
    (
        train,
        ["--config=configs/decoder.py:tiny", "--workdir={new}", "--config.model.caption=clip",
         "--config.data.tokenizer={file}"],
        "but CLIP reads the captions",
    ),
    *(
        (plan, [f"--config=configs/{name}.py:tiny", f"--config.model.{key}"], says)
        for name, key, says in (
            ("decoder", "image_size=14", r"model\.image_size is 14: expected a multiple of 4, as the 3 levels"),
            ("decoder", "unet.head_channels=0", r"head_channels is 0, and model\.unet\.heads is \(0, 0\): expected"),
            ("glide", "factor=3", r"model\.factor is 3: expected one that divides model\.image_size=16"),
            ("glide", "factor=2", r"model\.factor is 2, but there is no model\.interpolation"),
            ("upsampler_256", "factor=0", r"model\.factor is 0: expected one that divides"),
        )
    ),
    (plan, [], "no config"),
    (plan, [CLIP, "--config.model.widht=3"], "no key 'model.widht'"),
    (plan, [CLIP, "--config.stage=clop"], "stage 'clop' does not exist"),
    (train, ["--config={root}/own.json", "--workdir={new}"], "no .*, which every config of stage my_own has: add it"),
    (sample, ["--bundle={empty}"], "--prompt"),
    (sample, ["--bundle={root}/nowhere", "--prompt=x"], "no bundle at .*nowhere"),
    (sample, SAMPLE, "no bundle at .*decoder"),
    (sample, [*SAMPLE, "--n=4", "--rerank=3"], "--rerank 3: expected at least --n 4"),
    (sample, [*SAMPLE, "--n", "0"], "--n: '0': expected a whole number from 1"),
    (sample, [*SAMPLE, "--seed", str(2**64)], "expected a whole number from 0 to"),
    (sample, [*SAMPLE, "--prior-guidance", "nan"], "'nan': expected a finite number"),
    (sample, [*SAMPLE, "--prompts", "captions.txt"], "give one of --prompt"),
    (sample, [*SAMPLE, "--n", "two"], "--n.*'two'"),
    (sample, ["--prompts=captions.txt", "--preview"], "--preview goes with --prompt alone: .* beside --prompts"),
    (sample, ["--again=a.png", "--profile"], "--profile goes with --prompt alone: leave it out beside --again"),
    (sample, [*SAMPLE, "--preview", "--profile"], "give one of --preview and --profile"),
    (sample, [*SAMPLE, "--profile={file}"], "--profile .*file is a file"),
    (sample, [*SAMPLE, "--out={file}"], "--out .*file is a file"),
    (sample, [*SAMPLE, "--sed=1"], "--sed=1"),
    (quickstart, ["--out={file}"], "--out .*file is a file"),
    (quickstart, ["--out={new}", "--steps=0"], "--steps: '0': expected a whole number from 1"),
    (quickstart, ["--out={new}", "--stpes=3"], "--stpes=3"),
]


@pytest.mark.parametrize(
    ("module", "arguments", "says"), REFUSED, ids=[f"{m.__name__.split('.')[-1]}-{says}" for m, _, says in REFUSED]
)
def test_bad_input_is_refused_in_one_line(module, arguments, says, places, monkeypatch):
    monkeypatch.setattr(cli, "enable_compilation_cache", lambda: None)
    with pytest.raises(UserError, match=says) as caught:
        module.main([module.__name__, *(argument.format(**places) for argument in arguments)])
    assert "\n" not in str(caught.value)
    assert not Path(places["new"]).exists(), "refused only after something was written"


def test_a_mistake_is_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "unclip_jax.plan", "--config=configs/decoder.py:tiny", "--config.model.unit=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --config.model.unit: ") and done.stderr.count("\n") == 1


CONFIGS = [("c.json", f'{{"config": {value}}}', "holds no config") for value in ("5", "[1]", '"abc"', "null", "{}")]
CONFIGS += [("c.json", "[" * 100_000, "holds no config"), ("c.json", "no JSON", "holds no config")]
CONFIGS += [("c.py", "x = ]", r"no config that can be run: SyntaxError: unmatched '\]'"),
            ("c.py", "x = 5", "no config that can be run: AttributeError: .* no attribute 'get_config'"),
            ("c.py", "raise KeyError(3)", "no config that can be run: KeyError: 3")]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "says"), CONFIGS)
def test_files_that_are_no_configs_are_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says):
        cli.load_config(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["a file, not a folder", "a folder above it, not a file"])
def test_a_folder_in_place_of_a_file_is_one_line(kind, tmp_path, capsys):
    (tmp_path / "file").touch()

    def main(argv):
        (tmp_path if "not a folder" in kind else tmp_path / "file" / "below").read_bytes()

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 2 and capsys.readouterr().err.endswith(f": expected {kind}\n")


@pytest.mark.parametrize(("before", "after"), [(None, "0.9"), ("0.5", "0.5")])
def test_commands_let_jax_take_nine_tenths_of_a_gpu(before, after, monkeypatch):
    name, seen = "XLA_PYTHON_CLIENT_MEM_FRACTION", []
    monkeypatch.setenv(name, before or "")  # which is undone afterwards, whatever the command sets
    if not before:
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit):
        cli.run(lambda argv: seen.append(os.environ[name]))
    assert seen == [after]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two runs of `sample` on a random cascade: other prompts, seed and guidance. Their folders, and the last words."""
    bundle = str(save_cascade(tmp_path_factory.mktemp("bundle")))
    folders = [tmp_path_factory.mktemp("drawn") / "new" for _ in range(2)]
    arguments = [
        ["--prompt=a red apple", "--prompt=one blue fox & a tent/..", "-n", "2", "--seed", "7"],
        ["--prompt=a green whale", "--n", "4", "--guidance", "3.5", "--prior-guidance=2"],
    ]
    with pytest.MonkeyPatch.context() as patch, compilation_cache():
        patch.setattr(model, "CHUNK_ROWS", 2)
        for folder, options in zip(folders, arguments, strict=True):
            with contextlib.redirect_stderr(io.StringIO()) as words:
                assert sample.main(["sample", f"--bundle={bundle}", f"--out={folder}", *options]) == 0
    return *folders, words.getvalue()


def test_sample_writes_pictures_that_say_what_they_are(drawn):
    first, second, _ = drawn
    names = ["a_red_apple_7_0", "a_red_apple_7_1", "one_blue_fox_a_tent_7_2", "one_blue_fox_a_tent_7_3", "grid"]
    assert sorted(path.name for path in first.iterdir()) == sorted(f"{name}.png" for name in names)
    with Image.open(first / f"{names[2]}.png") as picture:
        assert picture.size == (128, 128)
        assert picture.text["prompt"] == "one blue fox & a tent/.."
        assert [picture.text[name] for name in ("seed", "row", "draw")] == ["7", "1", "0"]
        settings = json.loads(picture.text["settings"])
    assert settings["version"] == __version__ and settings["n"] == 2
    assert (settings["guidance"], settings["prior_guidance"]) == (1.5, 1.0)  # the tiny configs'
    assert settings["models"].keys() == {"clip", "prior", "decoder", "upsampler_256", "upsampler_1024"}
    assert {len(identity) for identity in settings["models"].values()} == {64}
    grid = np.asarray(Image.open(first / "grid.png"))
    assert grid.shape[1] < 3 * 128 and grid.shape[0] > 2 * 128  # a row for each prompt

    with Image.open(second / "a_green_whale_0_3.png") as picture:
        settings = json.loads(picture.text["settings"])
    assert (settings["n"], settings["guidance"], settings["prior_guidance"]) == (4, 3.5, 2.0)


def test_again_draws_the_very_picture_without_being_told_what(drawn, tmp_path):
    name = "one_blue_fox_a_tent_7_3.png"
    with pytest.MonkeyPatch.context() as patch, compilation_cache():
        patch.setattr(model, "CHUNK_ROWS", 2)
        assert sample.main(["sample", f"--again={drawn[0] / name}", f"--out={tmp_path}"]) == 0
    before, after = (Image.open(folder / name) for folder in (drawn[0], tmp_path))
    np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
    assert after.text == before.text


@pytest.mark.parametrize("spoil", ["a photo", "another cascade"])
def test_again_refuses_what_it_cannot_draw(drawn, tmp_path, spoil):
    with Image.open(drawn[0] / "a_red_apple_7_0.png") as picture:
        settings = json.loads(picture.text["settings"])
        settings["models"]["prior"] = "f" * 64
        metadata = dict(picture.text) | {"settings": settings}
        pictures.save_png(tmp_path / "x.png", np.asarray(picture), {} if spoil == "a photo" else metadata)
    with pytest.raises(UserError, match="does not hold what" if spoil == "a photo" else "holds another prior than"):
        sample.main(["sample", f"--again={tmp_path / 'x.png'}", f"--out={tmp_path}"])


def test_a_second_sample_compiles_nothing(drawn):
    """Its models are loaded anew, as by another process; every program comes from the cache."""
    words = drawn[2].splitlines()[-1]
    assert re.fullmatch(r"4 pictures in [\d.]+ s, 0 programs compiled, [1-9]\d* from the cache", words)


@pytest.mark.parametrize("changed", [
    {"settings": "no JSON"}, {"settings": []}, {"position": "5"}, {"position": "-1"}, {"seed": "-1"}, {"seed": "x"},
    {"settings": {"batch": 10**12}}, {"settings": {"models": 5}}, {"settings": {"guidance": "high"}},
    {"settings": {"sampling": {"decoder": 5}}}, {"settings": {"sampling": {"decoder": {"steps": 5}}}},
    {"settings": {"from": 7}}, {"settings": {"sampling": {"decoder": {"eta": [1]}}}},
])  # fmt: skip
def test_settings_of_a_picture_that_were_changed_are_one_line(drawn, tmp_path, changed):
    with Image.open(drawn[0] / "a_red_apple_7_0.png") as picture:
        stored = dict(picture.text)
        if isinstance(changed.get("settings"), dict):
            changed = {"settings": json.loads(stored["settings"]) | changed["settings"]}
        pictures.save_png(tmp_path / "x.png", np.asarray(picture), stored | changed)
    with pytest.raises(UserError) as caught:
        sample.main(["sample", f"--again={tmp_path / 'x.png'}", f"--out={tmp_path / 'out'}"])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_rerank_keeps_each_prompts_nearest_best_first():
    class Likes:
        def similarity(self, images, texts):
            return images[:, :1, 0, 0].astype(float) * (1 if texts == ["light"] else -1)

    brightness = np.array([10, 30, 20, 40, 60, 50], np.uint8)
    images = np.broadcast_to(brightness[:, None, None, None], (6, 2, 2, 3))
    args = argparse.Namespace(prompt=["light", "dark"], n=2, rerank=3)
    np.testing.assert_array_equal(brightness[sample._best(Likes(), images, args)], [30, 20, 40, 50])


HANGS = """
import concurrent.futures, threading, time
from unclip_jax import cli
cli.LEAVE_SECONDS = 0.5
def main(argv):
    if argv[2] == "thread":
        threading.Thread(target=lambda: time.sleep(60)).start()
    else:
        concurrent.futures.ThreadPoolExecutor().submit(time.sleep, 60)
    if argv[1] == "2":
        raise cli.UserError("a mistake")
    return int(argv[1])
cli.run(main)
"""


def test_a_terminal_of_ascii_alone_shows_other_letters_by_their_numbers():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "ascii"}
    program = "from unclip_jax import cli; cli.run(lambda argv: print('samples/猫.png'))"
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "samples/\\u732b.png\n", "")


@pytest.mark.parametrize(("status", "kind"), [(2, "thread"), (3, "thread"), (3, "executor")])
def test_a_thread_that_hangs_does_not_keep_a_process_alive(status, kind):
    """An executor's thread is waited for earlier than others."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", HANGS, str(status), kind], env=environment, timeout=30)
    assert run.returncode == status


def test_futures_that_end_after_an_error_of_storage_say_nothing(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(sys, "__unraisablehook__", said.append)
    with pytest.raises(SystemExit):
        cli.run(lambda argv: 0)
    raised = []
    for text, file in (("Event loop is closed", "a.py"), ("cannot be read", "/x/orbax/y.py"), ("another", "a.py")):
        try:
            exec(compile("raise RuntimeError(text)", file, "exec"), {"text": text})
        except RuntimeError as error:
            raised.append(argparse.Namespace(exc_value=error, exc_traceback=error.__traceback__))
    another = raised[-1]
    for found in raised:
        sys.unraisablehook(found)
    assert said == [another]


def test_losses_are_expected_of_the_config_s_own_data_alone(tmp_path):
    command = ["train", "--config=configs/clip.py:tiny", f"--workdir={tmp_path}"]
    assert train.parse(command).config.train.expected_loss
    assert train.parse([*command, "--config.data.threads=1"]).config.train.expected_loss
    other = [*command, "--config.data.source=folder:mine"]
    assert train.parse(other).config.train.expected_loss == ()
    named = "--config.train.expected_loss=((5, 0.5, 1.0),)"
    assert train.parse([*other, named]).config.train.expected_loss == ((5, 0.5, 1.0),)
