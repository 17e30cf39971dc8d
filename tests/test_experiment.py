"""The command that runs experiments, those that come with it, and what is said of them."""

import dataclasses
import importlib.util
import json
import re
import shutil
import xml.etree.ElementTree
from pathlib import Path

import jax
import numpy as np
import pytest
from shrink import compilation_cache, save_weights

from unclip_jax import cli, experiment, shipped, trials
from unclip_jax.chain import SOURCES
from unclip_jax.config import flat_keys
from unclip_jax.errors import UserError
from unclip_jax.planning.programs import checked_stage, train_step_flops
from unclip_jax.trials import CONFIGS, Arm, Lab

FOLDER = Path(__file__).parents[1] / "experiments"
FILES = sorted(FOLDER.glob(f"*/{experiment.FILE}"))
# Experiments with a measure of their own of models that come with this package.
OWN_MEASURES = [path for path in FILES if "def measure" in path.read_text() and "changes=" not in path.read_text()]
OPTIONS = {"guidance_scale", "prior_guidance_scale", "clip_guidance_scale", "source"}
SAY = '''
from unclip_jax.trials import Arm, Claim, Experiment

EXPERIMENT = Experiment(
    question="Is two more?", paper="none", models=("clip", "decoder"),
    arms=(Arm("one", "the one", x=1), Arm("two", "the other", x=2)),
    measures={"height": "how high"}, claims=(Claim("It is.", "height", "two", "one"),), axis="number", captions=3,
)
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The file of an experiment whose second arm is higher by one."""

    def run(self, arm):
        return {"height": np.full((1, len(self.captions), 4), arm.x)}

    monkeypatch.setattr(Lab, "run", run)
    path = tmp_path / "own" / "experiment.py"
    path.parent.mkdir()
    path.write_text(SAY)
    return path


def run(*words):
    return experiment.main(["experiment", *map(str, words)])


def test_results_are_written_in_three_forms(own, tmp_path, capsys):
    assert run(own, "--workdir", tmp_path / "work") == 0
    out = tmp_path / "work" / "own"
    *lines, last = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["value"] for line in lines] == [1, 2, 1] and last == {"minutes": 0.0}
    assert lines[-1]["verdict"] == "reproduced" and lines[0]["n"] == 12
    table = (out / "results.md").read_text()
    assert "| the other | 2.000 [2.000, 2.000] |" in table and table in capsys.readouterr().out
    assert "| It is. | 1.000 [1.000, 1.000] | how high: the other − the one | 12 | reproduced |" in table
    figure = (out / "figure.svg").read_bytes()
    assert xml.etree.ElementTree.fromstring(figure).tag.endswith("svg")
    assert sorted(path.name for path in own.parent.iterdir()) == ["experiment.py"]
    assert run(own, "--workdir", tmp_path / "work", "--publish") == 0
    assert (own.parent / "figure.svg").read_bytes() == figure, "the same results give the same figure"


def test_fewer_captions_and_draws_can_be_asked_for(own, tmp_path):
    assert run(own, "--workdir", tmp_path, "--captions", 2) == 0
    assert json.loads((tmp_path / "own/results.jsonl").read_text().splitlines()[0])["n"] == 8
    with pytest.raises(UserError, match="--publish goes with the whole experiment"):
        run(own, "--workdir", tmp_path, "--captions", 2, "--publish")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["guidance"], "no --workdir"),
        (["--workdir", "x"], "no experiment: name one of --list"),
        (["guidence", "--workdir", "x"], r"no experiment 'guidence': expected one of .*guidance"),
        (["guidance", "--workdir", "x", "--captions", "2000"], "2000.*: expected a whole number from 1 to 1,920"),
    ],
)
def test_a_mistake_is_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(*words)


@pytest.mark.parametrize("place", ["hf:me/tiny/experiment.py", "gs://bucket/experiment.py"])
def test_no_program_is_run_from_afar(place, tmp_path):
    with pytest.raises(UserError, match="is a program, which is run from a disk alone"):
        run(place, "--workdir", tmp_path)


def test_values_that_are_not_there_are_null(own, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Lab, "run", lambda self, arm: {"height": np.full((1, 3, 4), np.nan)})
    assert run(own, "--workdir", tmp_path) == 0
    text = (tmp_path / "own/results.jsonl").read_text()
    assert "NaN" not in text and json.loads(text.splitlines()[0])["value"] is None
    assert "| the one | — |" in (tmp_path / "own/results.md").read_text() and not list(recwarn)


def test_results_are_kept_by_the_experiment_s_own_name(own, tmp_path, monkeypatch):
    shutil.copy(own, tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    assert run("mine.py", "--workdir", "work") == 0
    assert (tmp_path / "work/mine/results.jsonl").exists()


def test_a_file_without_an_experiment_is_refused(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("x = 1\n")
    with pytest.raises(UserError, match="defines no EXPERIMENT"):
        run(path, "--workdir", tmp_path)


def test_the_cost_of_training_is_said_first(tmp_path, monkeypatch, capsys):
    """By size: the larger ones learn the same scenes."""
    said = {}
    monkeypatch.setattr(shipped, "find", lambda known: None)
    for size in ("", ":small"):
        assert run(f"binding{size}", "--workdir", tmp_path / "work", "--cost") == 0
        said[size] = re.search(r"trained: (.+); (.+) FLOPs, or (.+) (core|chip)-hours", capsys.readouterr().err)
    assert said[""].group(1) == said[":small"].group(1) == "1 × clip, 1 × prior, 2 × decoder"
    config = cli.load_config("configs/glide.py:shipped")
    shapes = jax.eval_shape(checked_stage(config).init, jax.random.key(0))
    one = config.train.steps * train_step_flops(config, shapes)
    assert 2 * one < float(said[""].group(2)) < 10 * one and said[""].group(4) == "core"
    assert float(said[""].group(3)) == pytest.approx(float(said[""].group(2)) / 40e9 / 3600, rel=0.05)
    assert float(said[":small"].group(2)) > 100 * one and said[":small"].group(4) == "chip"
    assert not list((tmp_path / "work").rglob("*.json"))

    small = Lab(dataclasses.replace(experiment.load(FOLDER / "binding" / "experiment.py"), size="small"), tmp_path, "d")
    config = small.config(small.experiment.arms[0], "decoder")
    assert config.data.source == "tfds:emoji_scenes/varied_256" and config.model.image_size == 64
    with pytest.raises(UserError, match="'huge' is no size: expected one of shipped, small, paper"):
        run("binding:huge", "--workdir", tmp_path / "work", "--cost")


def test_what_is_trained_costs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shipped, "find", lambda known: FOLDER)
    monkeypatch.setattr(trials, "load_description", lambda folder: {"identity": "that of a CLIP"})
    assert run("binding", "--workdir", tmp_path / "work", "--cost") == 0
    assert "nothing is to be trained" in capsys.readouterr().err


def test_arms_whose_models_are_there_can_be_taken_alone(tmp_path, monkeypatch):
    """A GLIDE is missing: its arm is left out, with the claims on it."""
    whole = experiment.load(FOLDER / "binding" / "experiment.py")
    glide = trials.digest(Lab(whole, tmp_path, "d").config(whole.arms[1], "decoder"))
    monkeypatch.setattr(shipped, "find", lambda known: None if known == glide else FOLDER)
    monkeypatch.setattr(trials, "load_description", lambda folder: {"identity": "that of a CLIP"})
    part = trials.trained_already(whole, tmp_path, "d")
    assert [arm.name for arm in part.arms] == ["unclip"] and part.claims == ()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_experiments_ask_for_what_there_is(path, tmp_path):
    """Every key of their arms is one of the config that it changes, and every claim is of its own arms."""
    found = experiment.load(path)
    names = [arm.name for arm in found.arms]
    assert len(set(names)) == len(names) and set(found.models) <= set(CONFIGS)
    assert all(re.fullmatch(r"[a-z0-9_.]+", name) for name in names), "names of files"
    for claim in found.claims:
        assert {claim.larger, claim.smaller} <= set(names) and claim.measure in found.measures
    laboratory = Lab(found, tmp_path, "data")
    for arm in found.arms:
        for name in found.models:
            config = laboratory.config(arm, name)  # raises for a key that is not there
            for key in arm.sampling.get(name, {}):
                assert f"sampling.{key}" in set(flat_keys(config))
        assert set(arm.options) <= OPTIONS and arm.options.get("source") in (None, *SOURCES)
        assert set(arm.sampling) <= {"decoder", "prior"} and set(arm.configs) | set(arm.changes) <= set(found.models)


def test_numbers_that_were_not_measured_are_noticed(own, tmp_path):
    assert run(own, "--workdir", tmp_path, "--publish") == 0
    table = own.with_name("results.md").read_text()
    own.with_name("README.md").write_text(f"# Two\n\n{table}\n**Reproduced**: 2.000 is more than 1.000.\n")
    check_published(own)
    for wrong in ("**Reproduced**: 0.731 is more.", "**Cannot tell**"):
        own.with_name("README.md").write_text(f"{table}\n{wrong}\n")
        with pytest.raises(AssertionError):
            check_published(own)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_what_is_said_of_an_experiment_is_what_was_measured(path):
    """results.md and the folder's README hold the numbers of results.jsonl, and no others."""
    if path.with_name(experiment.RESULTS).exists():
        check_published(path)
    else:
        assert not path.with_name("README.md").exists(), "a README without results"


def check_published(path):
    stored = path.with_name(experiment.RESULTS)
    found, results = experiment.load(path), [json.loads(line) for line in stored.read_text().splitlines()]
    table = experiment.table(found, results)
    assert path.with_name(experiment.TABLE).read_text() == table
    text = path.with_name("README.md").read_text()
    assert table in text and f"**{trials.verdict(results)}**" in text.lower()
    numbers = set(re.findall(r"\d\.\d{3}", table))
    assert set(re.findall(r"\b[01]\.\d{3}\b", text)) <= numbers


def test_the_overview_is_that_of_the_list(capsys):
    assert run("--list") == 0
    assert capsys.readouterr().out in (FOLDER / "README.md").read_text()


def test_configs_of_shipped_models_belong_together():
    clip = cli.load_config("configs/clip.py:shipped")
    sizes = {name: cli.load_config(f"configs/{name}.py:shipped") for name in CONFIGS.values()}
    assert sizes["decoder"].model.embedding_dim == sizes["prior_diffusion"].model.embedding_dim == clip.model.dim
    assert sizes["clip_noised"].model.image_size == sizes["decoder"].model.image_size


def test_an_arm_may_be_of_another_config(tmp_path):
    found = dataclasses.replace(experiment.load(FILES[0]), models=("clip", "prior", "decoder"))
    config = Lab(found, tmp_path, "data").config(Arm("glide", "GLIDE", {"decoder": "glide"}), "decoder")
    assert config.stage == "glide"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights"))


@pytest.mark.slow
@pytest.mark.parametrize("path", OWN_MEASURES, ids=lambda path: path.parent.name)
def test_what_an_experiment_measures_can_be_measured(path, weights, tmp_path, monkeypatch):
    """Its first and its last arm of which nothing is trained, drawn by small random models."""
    monkeypatch.setattr(shipped, "FOLDER", weights)
    monkeypatch.setattr(shipped, "MANIFEST", weights / "manifest.json")
    whole = experiment.load(path)
    if "TRAINING" in whole.measure.__globals__:
        monkeypatch.setitem(whole.measure.__globals__, "TRAINING", 160)
    some = dataclasses.replace(whole, captions=6)
    laboratory = Lab(some, tmp_path, str(tmp_path / "data"))
    arms = [arm for arm in some.arms if not arm.changes]
    with compilation_cache():
        for arm in (arms[0], arms[-1]):
            values = laboratory.run(arm)
            assert set(some.measures) <= set(values)
            for name in some.measures:
                assert values[name].shape[:2] == (1, 6), name
                assert np.isfinite(values[name]).any() or name in ("neat", "variety"), "of readable pictures alone"


def test_the_table_of_samplers_is_of_what_was_measured():
    folder = FOLDER / "decoder_steps"
    spec = importlib.util.spec_from_file_location("frechet_of_samplers", folder / "frechet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (folder / "samplers.md").read_text()
    assert page == module.table(json.loads((folder / "frechet.json").read_text()))
    assert page.count("| Decoder |") == 10 and page.count("| Prior |") == 13
