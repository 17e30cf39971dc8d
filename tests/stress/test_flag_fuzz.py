"""Every flag of every command with odd values: refused in one line before anything is drawn or written, or it works.

A command that works with its odd value has run to its end. `UNCLIP_FLAG_CASES` is the number of cases that are tried of
each command, drawn by a seed; all are a few hundred of each.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from shrink import compilation_cache, save_cascade, save_pictures, small_config, small_stage, tokenizer_bytes
from test_evaluate import Means
from test_experiment import SAY
from test_study import for_arm, make, save_arms, save_votes

from unclip_jax import (
    build_dataset,
    cli,
    demo,
    doctor,
    edit,
    evaluate,
    experiment,
    hub,
    plan,
    push,
    quickstart,
    sample,
    study,
    train,
)
from unclip_jax.bundle import load_bundle, save_bundle
from unclip_jax.data import __main__ as data
from unclip_jax.evaluation import features
from unclip_jax.model import Model
from unclip_jax.pretrained import __main__ as pretrained
from unclip_jax.training import preflight
from unclip_jax.trials import Lab

sys.path.append(str(Path(__file__).parents[1] / "pretrained"))
from test_glide import ARGS, glide_tensors, save_vocabulary

pytestmark = pytest.mark.stress
CASES = int(os.environ.get("UNCLIP_FLAG_CASES", "12"))
SECONDS = 300  # that a case may take
NUMBERS = ["0", "-1", "2", "1000000000000000000", "1e300", "1.5", "nan", "inf", "None", "abc", "", " ", "٣", "0x10"]
TEXTS = ["0", "nan", "None", "", " ", "../../x", "{text}", "{spoiled}", "{pictures}", "{empty}", "{root}/nowhere", "猫"]
TEXTS += ["\udcff", "a" * 5000, "gs:/bucket", "\x1b[2J"]
BUNDLE, DRAW = "--bundle={cascade}", ["--seed=3", "--steps=2", "--prior-steps=2", "--out=out"]
CHANGE = [BUNDLE, "--image={one}", "--out=out"]
FILTER = ["--filter={filter}", "--clip={cascade}/clip"]
BUILD = ["build", "--source=folder:{pictures}", "--out=out", "--name=mine", "--clip={cascade}/clip"]
BUILD += ["--min-similarity=0.1", "--filter={filter}"]
# Name → its main, and words that it works with. Every flag that it has is given another value, besides these.
COMMANDS = {
    "sample": (sample, [BUNDLE, "--prompt=a red apple", "--n=1", *DRAW]),
    "sample --prompts": (sample, [BUNDLE, "--prompts={captions}", "--n=1", *DRAW]),
    "sample --again": (sample, ["--again={drawn}", "--out=out"]),
    "edit variations": (edit, ["variations", *CHANGE, "--n=1", "--steps=3"]),
    "edit interpolate": (edit, ["interpolate", *CHANGE, "--image={two}", "--n=2", "--steps=3"]),
    "edit text_diff": (edit, ["text_diff", *CHANGE, "--after=a blue fox", "--n=2", "--steps=3"]),
    "edit reconstruct": (edit, ["reconstruct", *CHANGE, "--components=1", "--pca={prior_ar}", "--steps=3"]),
    "edit inpaint": (edit, ["inpaint", *CHANGE, "--mask={mask}", "--prompt=a red apple", "--n=1"]),
    "edit sdedit": (edit, ["sdedit", *CHANGE, "--prompt=a red apple", "--n=1"]),
    "edit classify": (edit, ["classify", *CHANGE, "--label=a fox", "--label=a tent"]),
    "evaluate": (evaluate, ["fid", "--pictures={others}", "--reference={others}", "--inception=x"]),
    "evaluate --clip": (evaluate, ["clip_score", "--pictures={pictures}", "--clip={cascade}/clip"]),
    "evaluate --bundle": (evaluate, ["clip_score", "--clip={cascade}/clip", "--pictures=out/drawn", BUNDLE,
                                     "--prompts={captions}", *DRAW[:3]]),
    "study make": (study, ["make", "--question=caption", "--arm=a={arms}/arm0", "--arm=b={arms}/arm1", "--out=out"]),
    "study score": (study, ["score", "{votes}", "--key={study}/key.json"]),
    "experiment": (experiment, ["{own}/experiment.py", "--workdir=out"]),
    "quickstart": (quickstart, ["--out=out", "--seed=1", "--steps=1"]),
    "doctor": (doctor, ["--json"]),
    "push": (push, ["{cascade}", "hf:me/tiny", "--license=mit"]),
    "demo": (demo, [BUNDLE, "--port=17860"]),
    "pretrained": (pretrained, ["glide", "{glide}", "--out=out", *ARGS]),
    "data filter train": (data, ["filter", "train", "--positive={pictures}", "--negative={others}",
                                 "--clip={cascade}/clip", "--out=out/filter.npz"]),
    "data filter check": (data, ["filter", "check", *FILTER, "--positive={pictures}", "--negative={others}"]),
    "data filter apply": (data, ["filter", "apply", *FILTER, "--pictures={pictures}", "--out=out/kept.txt"]),
    "data build": (data, BUILD),
    "plan": (plan, ["--config={root}/clip.json"]),
    "train": (train, ["--config={root}/clip.json", "--workdir=out"]),
    "data embed": (data, ["embed", "--config={root}/prior_diffusion.json", "--out=out"]),
    "data tokenizer": (data, ["tokenizer", "--config={root}/clip.json", "--out=out/a.model"]),
}  # fmt: skip
TYPED = {"plan": plan.FLAGS, "train": train.FLAGS}  # flags of commands that take a config
TYPED |= {f"data {name}": flags | preflight.FLAGS for name, flags in data.FLAGS.items()}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Files and folders that words name in braces."""
    root = tmp_path_factory.mktemp("places")
    names = ("cascade", "pictures", "others", "empty", "arms", "study", "own", "glide", "prior_ar")
    found = {name: root / name for name in names} | {"root": root}
    clip = save_cascade(found["cascade"]) / "clip"
    for name in ("upsampler_256", "upsampler_1024"):  # which no flag reaches
        shutil.rmtree(found["cascade"] / name)
    stage, _, params = small_stage("prior_ar")
    save_bundle(found["prior_ar"], "prior_ar", stage.config, params, tokenizer_bytes(), load_bundle(clip).identity, {})

    rng = np.random.default_rng(0)
    save_pictures(found["pictures"])
    for name in ("others", "empty", "own", "glide"):
        found[name].mkdir()
    mask = np.zeros((24, 24), np.uint8)
    mask[4:9, 4:9] = 255
    noise = {f"others/{i}": rng.integers(0, 256, (24, 24, 3)).astype(np.uint8) for i in range(24)}
    for name, pixels in (noise | {"one": noise["others/1"], "two": noise["others/2"], "mask": mask}).items():
        found[name] = root / f"{name}.png"
        Image.fromarray(pixels).save(found[name])
    texts = {"captions.txt": "a red apple\na blue fox\n", "spoiled.png": "no picture", "text.txt": "x"}
    for name, text in texts.items():
        found[name.partition(".")[0]] = root / name
        (root / name).write_text(text)
    key = make(save_arms(found["arms"]), found["study"])
    words = ["win", "loss", "tie"] * 2
    found["votes"] = save_votes(root / "votes.csv", key, for_arm(key, "secret0", words))
    (found["own"] / "experiment.py").write_text(SAY)
    save_file(glide_tensors(3), found["glide"] / "base.safetensors")
    save_vocabulary(found["glide"])
    for name in ("clip", "prior_diffusion"):
        config = small_config(name).unlock()
        config.data.update(dict(source=f"folder:{found['pictures']}", threads=1))
        config.train.update(dict(steps=1, sample_every=10**6))
        if name != "clip":
            config.clip.bundle = str(clip)
        (root / f"{name}.json").write_text(json.dumps({"config": config.to_dict()}))

    with compilation_cache():
        bundle = f"--bundle={found['cascade']}"
        sample.main(["sample", bundle, "--prompt=a red apple", "--n=1", *DRAW[:3], f"--out={root / 'drawn'}"])
        found["drawn"] = root / "drawn" / "a_red_apple_3_0.png"
        words = [f"--positive={found['pictures']}", f"--negative={found['others']}", f"--clip={clip}"]
        data.main(["data", "filter", "train", *words, f"--out={root / 'filter.npz'}"])
    return found | {"filter": root / "filter.npz"}


@pytest.fixture
def light(monkeypatch):
    """Leaves out what takes long, needs a network or packages that may be missing, or ends the process."""

    def trained(self, arm):
        return {"height": np.full((1, len(self.captions), 4), arm.x)}

    monkeypatch.setattr(Lab, "run", trained)
    monkeypatch.setattr(features, "inception", Means)
    monkeypatch.setattr(quickstart, "open_source", lambda *_: None)
    monkeypatch.setattr(quickstart.train, "run", lambda *_: signal.SIGTERM)
    monkeypatch.setattr(quickstart.train, "exit_status", lambda _: 0)
    monkeypatch.setattr(doctor, "_devices", lambda: ["1 cpu"])
    monkeypatch.setattr(hub, "push", lambda *_: "https://hub")
    monkeypatch.setattr(demo, "serve", lambda *_: None)
    monkeypatch.setattr(build_dataset, "_beam", lambda _: (None, None))
    built = {"shards": {"train": {"0": 1}}, "dropped": {}, "unreadable": []}
    monkeypatch.setattr(build_dataset, "_run", lambda *_: built)
    monkeypatch.setattr(build_dataset.build, "describe", lambda *_: None)
    monkeypatch.setattr(preflight, "end_all", lambda _: None)
    monkeypatch.setattr(cli, "_leave_soon", lambda _: None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")


class Flags(Exception):
    """The flags of a parser, instead of what it would read."""


def flags_of(main, words):
    """A command's flags, each with its odd values."""

    def flags(parser, *_):
        raise Flags([action for action in parser._actions if action.option_strings])

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Flags) as caught:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, flags)
        main(words)
    kinds = {action.option_strings[-1]: bool if action.nargs == 0 else action.type for action in caught.value.args[0]}
    return {flag: odd_values(kind) for flag, kind in kinds.items()}


def odd_values(kind):
    """What follows a flag whose value is of a type, or is read by a function; None: a text."""
    if kind is bool:
        return ["", "=0", "=", "=abc"]
    return ["", *(f"={value}" for value in (TEXTS if kind in (None, str) else NUMBERS))]


def cases(name):
    """Words of every odd value of every flag of a command, and of every word without a flag, in random order."""
    module, words = COMMANDS[name]
    if name in TYPED:
        flags = {f"--{flag}": odd_values(kind) for flag, (kind, _, _) in TYPED[name].items()}
    else:
        flags = flags_of(module.main, [name, *words])
    found = []
    for flag, values in flags.items():
        rest = [word for word in words if word != flag and not word.startswith(f"{flag}=")]
        found += [[*rest, f"{flag}{value}"] for value in values]
        found += [rest] * (rest != words)
    for place in (place for place, word in enumerate(words) if not word.startswith("-")):
        found += [[*words[:place], value, *words[place + 1 :]] for value in TEXTS]
    random.Random(0).shuffle(found)
    return found


def run(module, words, folder, monkeypatch):
    """(status, what it said on stderr) of a command, in a folder of its own."""
    (deep := folder / "a" / "b" / "c").mkdir(parents=True)
    monkeypatch.chdir(deep)
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            cli.run(module.main)
        except SystemExit as end:
            return end.code, said.getvalue()


def outcome(name, words, folder, monkeypatch):
    """"works", "refused" in one line before anything is drawn or written, or what is at fault; and what was said."""
    module, drawn = COMMANDS[name][0], []
    draw = Model.draw
    monkeypatch.setattr(Model, "draw", lambda self, *args, **more: drawn.append(1) or draw(self, *args, **more))
    signal.alarm(SECONDS)
    try:
        status, said = run(module, words, folder, monkeypatch)
    except (Exception, MemoryError) as error:
        return "traceback", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.alarm(0)
        monkeypatch.setattr(Model, "draw", draw)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if status == 0:
        return "works", ""
    if status != 2 or len(lines) != 1 or not said.endswith(f"{lines[0]}\n"):
        return "several lines", f"status {status}: {said[-300:]}"
    written = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return ("late", f"{lines[0]} {written}") if drawn or written else ("refused", lines[0])


@pytest.mark.parametrize("name", COMMANDS)
def test_odd_values_are_refused_in_one_line_or_work(name, places, light, tmp_path, monkeypatch, record_property):
    def too_long(*_):
        raise TimeoutError(f"more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, too_long)
    usual, found, counts, wrong = COMMANDS[name][1], cases(name), collections.Counter(), []
    with compilation_cache():
        for number, words in enumerate([usual, *found[:CASES]]):
            folder = tmp_path / str(number)
            result, said = outcome(name, [word.format(**places) for word in words], folder, monkeypatch)
            shutil.rmtree(folder)
            odd = [word[:60] for word in words if word not in usual]
            print(f"{name} {odd!r}: {result} {said[:200]}", flush=True)
            if number == 0:
                assert result == "works", said
                continue
            counts[result] += 1
            if result not in ("works", "refused"):
                wrong.append(f"{name} {odd!r}: {result}: {said}")
    record_property("counts", json.dumps(dict(counts)))
    print(f"{name}: {counts.total()} of {len(found)} cases: {dict(counts)}", flush=True)
    assert not wrong, "\n".join(wrong)
