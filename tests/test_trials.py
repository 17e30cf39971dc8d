"""Experiments: what is trained, drawn and measured of each arm, what is kept, and what is concluded."""

import dataclasses
import importlib.util
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from shrink import compilation_cache, save_cascade, small_stage, tokenizer_bytes

from unclip_jax import cli, experiment, trials
from unclip_jax.bundle import save_bundle
from unclip_jax.data import varied_scenes
from unclip_jax.errors import UserError
from unclip_jax.evaluation import factor_scores, factors
from unclip_jax.evaluation.factor_values import scene_values
from unclip_jax.evaluation.preferences import chance
from unclip_jax.trials import Arm, Claim, Experiment, Lab, Stopped, compare, digest, verdict

MEASURED = [
    path
    for path in sorted((Path(__file__).parents[1] / "experiments").glob(f"*/{experiment.FILE}"))
    if "measure=measure" in path.read_text()
]
FOLDERS = {"clip": "clip", "prior_diffusion": "prior", "decoder": "decoder", "upsampler": "upsampler_256",
           "glide": "glide"}  # fmt: skip
PLAIN = Arm("plain", "as it comes")
GUIDED = Arm("guided", "guided", options={"guidance_scale": 4.0}, x=4.0)
TEXT = Arm("text", "trained on z_t", changes={"decoder": {"model.embedding": "text"}})
SMALL = Experiment(
    question="?", paper="nowhere", models=("clip", "prior", "decoder"), arms=(PLAIN, GUIDED, TEXT),
    measures={"named": "named factors"}, claims=(Claim("It is larger.", "named", "guided", "plain"),),
    captions=2, draws=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    with compilation_cache():
        folder = save_cascade(tmp_path_factory.mktemp("bundles"))
        stage, _, params = small_stage("glide")
        save_bundle(folder / "glide", "glide", stage.config, params, tokenizer_bytes(), "", {})
        yield folder


@pytest.fixture
def trained(bundles, monkeypatch):
    """Configs that were trained: training copies a bundle of shrunk models."""
    configs = []

    def run(config, workdir):
        configs.append(config)
        shutil.copytree(bundles / FOLDERS[config.stage], f"{workdir}/bundle")
        with open(f"{workdir}/metrics.jsonl", "w") as file:
            file.write('{"step": 1, "seconds": 60.0}\n')
        return {"sha256": "", "metrics": {}}

    monkeypatch.setattr(trials.train, "run", run)
    monkeypatch.setattr(trials.shipped, "find", lambda known: None)  # nothing comes with the package
    return configs


def lab(tmp_path, experiment=SMALL, **given):
    return Lab(experiment, tmp_path, "data", **given)


def test_nothing_is_trained_or_drawn_twice(tmp_path, trained, monkeypatch):
    earlier = lab(tmp_path)
    first = [earlier.run(arm) for arm in SMALL.arms]
    assert [config.stage for config in trained] == ["clip", "prior_diffusion", "decoder", "decoder"]
    assert [config.get("model").get("embedding") for config in trained[2:]] == ["image", "text"]
    assert {config.data.data_dir for config in trained} == {"data"}
    assert all(values["named"].shape == (1, 2, 2) for values in first)

    monkeypatch.setattr(trials, "draw_file", None)
    again = lab(tmp_path)
    for arm, before in zip(SMALL.arms, first, strict=True):
        for name, values in again.run(arm).items():
            np.testing.assert_array_equal(values, before[name])
    assert len(trained) == 4 and again.seconds == earlier.seconds > 0


def test_a_model_that_comes_with_the_package_is_not_trained(tmp_path, trained, bundles, monkeypatch):
    asked = []
    monkeypatch.setattr(trials.shipped, "find", lambda known: asked.append(known) or bundles / "clip")
    laboratory = lab(tmp_path)
    config = laboratory.config(PLAIN, "clip")
    assert laboratory.bundle(config) == bundles / "clip" and asked == [digest(config)] and not trained


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.parent.name)
def test_measures_of_each_experiment_are_of_each_picture(path, tmp_path, trained, monkeypatch):
    """Those that an experiment brings itself, of a few scenes."""
    found = experiment.load(path)
    monkeypatch.setitem(found.measure.__globals__, "TRAINING", 8)
    few = dataclasses.replace(found, captions=3)
    laboratory = lab(tmp_path, few)
    values = few.measure(laboratory, laboratory.cascade(few.arms[0]), few.arms[0])
    assert all(values[name].shape == (3, few.draws) for name in few.measures)


def test_arms_draw_as_they_say(tmp_path, trained):
    drawn = {}
    for arm in (PLAIN, GUIDED, Arm("steps", "fewer steps", sampling={"decoder": {"steps": "2"}})):
        laboratory = lab(tmp_path)
        drawn[arm.name] = laboratory.draw(laboratory.cascade(arm), arm)
        assert drawn[arm.name].shape[:2] == (2, 2)
    assert not np.array_equal(drawn["plain"], drawn["guided"])
    assert not np.array_equal(drawn["plain"], drawn["steps"])


def test_each_seed_trains_what_an_arm_changes_and_what_the_experiment_asks_for(tmp_path, trained):
    def measure(lab, cascade, arm):
        return {"named": np.zeros((2, 2))}

    twice = dataclasses.replace(SMALL, seeds=2, measure=measure)
    lab(tmp_path, twice).run(TEXT)
    assert [(config.stage, config.train.seed) for config in trained if config.train.seed] == [("decoder", 1)]
    assert lab(tmp_path, twice).run(PLAIN)["named"].shape == (1, 2, 2), "nothing of it is trained by a second seed"
    lab(tmp_path, twice).run(Arm("other", "other prior", configs={"prior": "prior_diffusion"}))
    assert ("prior_diffusion", 1) in [(config.stage, config.train.seed) for config in trained]
    seeded = Arm("seven", "from seed 7", changes={"decoder": {"train.seed": 7}})
    assert lab(tmp_path, twice).config(seeded, "decoder", 1).train.seed == 8
    values = lab(tmp_path, dataclasses.replace(twice, seeded=("prior",))).run(PLAIN)
    assert ("prior_diffusion", 1) in [(config.stage, config.train.seed) for config in trained]
    assert values["named"].shape == (2, 2, 2)


def test_what_is_trained_is_in_the_digest():
    config = cli.load_config("configs/clip.py:tiny").unlock()
    before = digest(config)
    config.train.checkpoint_every, config.data.threads = 17, 3
    assert digest(config) == before
    for key, value in {"train.seed": 1, "train.steps": 7, "model.dim": 32, "data.source": "folder:x"}.items():
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict({key: value})
        assert digest(other) != before, key


def test_the_weights_that_a_training_begins_with_are_in_the_digest(bundles):
    config = cli.load_config("configs/clip.py:tiny").unlock()
    before = digest(config)
    found = set()
    for name in ("clip", "decoder"):
        config.init.bundle = str(bundles / name)
        found.add(digest(config))
    assert len({before, *found}) == 3
    shutil.copytree(bundles / "decoder", bundles / "elsewhere")
    config.init.bundle = str(bundles / "elsewhere")
    assert digest(config) in found, "where they lie does not matter"


def test_trainings_are_short_at_the_shipped_size_alone(tmp_path):
    steps = {"decoder": {"train.steps": 3}}
    for size, expected in (("shipped", [3, None]), ("small", [None, None])):
        experiment = dataclasses.replace(SMALL, size=size, short=steps)
        whole = cli.load_config(f"configs/decoder.py:{size}").train.steps
        found = [lab(tmp_path, experiment).config(arm, "decoder").train.steps for arm in (TEXT, PLAIN)]
        assert found == [number or whole for number in expected]


def test_a_key_that_a_config_does_not_have_is_named(tmp_path):
    arm = Arm("odd", "odd", changes={"decoder": {"model.embeding": "text"}})
    with pytest.raises(UserError, match=r"arm odd changes model\.embeding, which configs/decoder\.py:shipped"):
        lab(tmp_path).config(arm, "decoder")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": (PLAIN, PLAIN)}, "'plain' is the name of an arm, which another has"),
        ({"models": ("clip", "decodr")}, "'decodr' is a model: expected one of clip, prior"),
        ({"models": ("clip", "prior")}, "an experiment that draws needs a decoder"),
        ({"arms": (PLAIN, GUIDED, Arm("a", "", changes={"decodr": {}}))}, "'decodr' is a model that arm a changes"),
        ({"arms": (PLAIN, GUIDED, Arm("a", "", sampling={"clip": {}}))}, "'clip' is a model that arm a samples"),
        ({"claims": (Claim("", "named", "guided", "plane"),)}, "'plane' is an arm of a claim: expected one of plain"),
        ({"votes": "nmaed"}, "'nmaed' is the measure of votes: expected one of named"),
        ({"claims": (Claim("", "nmaed", "guided", "plain"),)}, "'nmaed' is the measure of a claim"),
    ],
)
def test_what_does_not_go_together_is_refused_at_once(changes, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(SMALL, **changes)


def test_another_measure_is_not_given_the_values_of_the_first(tmp_path, trained):
    """Two files of one folder, whose functions have one name."""
    found = []
    for value in (1.0, 2.0):
        path = tmp_path / f"measure_{value:.0f}.py"
        body = f"return {{'named': numpy.full((2, 2), {value})}}"
        path.write_text(f"import numpy\n\n\ndef measure(lab, cascade, arm):\n    {body}\n")
        spec = importlib.util.spec_from_file_location("measures", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(lab(tmp_path, dataclasses.replace(SMALL, measure=module.measure)).run(PLAIN)["named"].mean())
    assert found == [1.0, 2.0]


def test_a_stopped_training_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trials.shipped, "find", lambda known: None)
    monkeypatch.setattr(trials.train, "run", lambda config, workdir: signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        lab(tmp_path).run(PLAIN)
    assert stopped.value.by == signal.SIGTERM


def test_a_try_trains_for_a_few_steps(tmp_path):
    config = lab(tmp_path, steps=3).config(PLAIN, "prior")
    assert (config.train.steps, config.sampling.sampler) == (3, "ddim")


def test_values_of_pictures_are_those_of_factor_scores():
    """True pictures, and those of the next caption: equal to what is counted over all of them."""
    scenes, named, _ = zip(*(varied_scenes.scene_at("test", index) for index in range(12)), strict=True)
    shown = [s for pair in zip(scenes, (*scenes[1:], scenes[0]), strict=True) for s in pair]
    reading = factors.read(np.stack([varied_scenes.render(scene, 64) for scene in shown]))
    asked, names = [s for s in scenes for _ in range(2)], [n for n in named for _ in range(2)]
    values = scene_values(reading, scenes, named)
    counted = factor_scores.alignment(reading, asked, names)
    for name in ("all", *varied_scenes.factors()):
        assert np.nanmean(values[name]) == pytest.approx(counted[name].value), name
        assert np.isfinite(values[name]).sum() == counted[name].n
    np.testing.assert_array_equal(values["all"][:, 0], 1)
    assert values["named"][:, 1].mean() < 0.6
    assert np.nanmean(values["binding"]) == pytest.approx(factor_scores.binding(reading, asked, names).value)
    told = np.array([{"tint", "colour"} <= set(n) and s.tint != s.colour
                     for s, n in zip(map(factors.as_read, scenes), named, strict=True)])  # fmt: skip
    assert 0 < told.sum() < len(told) and np.isnan(values["both"][~told]).all()
    np.testing.assert_array_equal(values["both"][told], (values["tint"] * values["colour"])[told])
    assert np.nanmean(values["readable"]) == factor_scores.precision(reading).value
    for row in range(11):
        pair = [factors.as_read(scene) for scene in scenes[row : row + 2]]
        left = [name for name in varied_scenes.factors() if name not in ("object", *named[row])]
        left = [name for name in left if all(factor_scores.tells(scene.object, name) for scene in pair)]
        differ = np.mean([getattr(pair[0], name) != getattr(pair[1], name) for name in left])
        np.testing.assert_array_equal(values["variety"][row], [differ, differ] if left else [np.nan, np.nan])
    unread = {part: np.where(np.arange(24) % 2, 1.0, found) for part, found in reading.unexplained.items()}
    for part, factors_left in {"background": {"colour", "pattern"}, "word": {"word"}}.items():
        blind = dataclasses.replace(reading, unexplained=unread | {part: reading.unexplained[part]})
        variety = scene_values(blind, scenes, named)["variety"]
        for row, names in enumerate(named):
            left = factors_left - {*names}
            assert np.isfinite(variety[row]).all() == bool(left)
            differ = [getattr(shown[2 * row], name) != getattr(shown[2 * row + 1], name) for name in left]
            np.testing.assert_array_equal(variety[row], [np.mean(differ) if left else np.nan] * 2)


def results(*gaps, ours=()):
    """Of an arm for each gap and a claim for each; `ours`: numbers of those that no paper makes."""
    arms = [PLAIN, *(Arm(f"arm{k}", "") for k in range(len(gaps)))]
    claims = tuple(Claim(f"claim {k}", "named", f"arm{k}", "plain", k in ours) for k in range(len(gaps)))
    rng = np.random.default_rng(0)
    pairs = zip(arms, (0, *gaps), strict=True)
    values = {arm.name: {"named": gap + 0.1 * rng.normal(size=(1, 50, 2))} for arm, gap in pairs}
    return compare(dataclasses.replace(SMALL, arms=tuple(arms), claims=claims), values)


def test_verdicts_follow_the_interval_of_the_difference():
    found = results(0.3, -0.3, 0.0)
    assert [line["arm"] for line in found if "arm" in line] == ["plain", "arm0", "arm1", "arm2"]
    claims = [line for line in found if "claim" in line]
    assert [line["verdict"] for line in claims] == ["reproduced", "not reproduced", "cannot tell"]
    assert [line["value"] for line in claims] == pytest.approx([0.3, -0.3, 0], abs=0.04)
    assert json.loads(json.dumps(found)) == found


def test_an_oracle_votes_by_a_measure():
    """Elo scores of three arms, the n of all votes, and what a table shows of them."""
    arms = (PLAIN, GUIDED, TEXT)
    rng = np.random.default_rng(0)
    values = {arm.name: {"named": gap + rng.normal(size=(1, 60, 2))} for arm, gap in zip(arms, (0, 1, 2), strict=True)}
    values["plain"]["named"][0, 0, 0] = np.nan
    voted = dataclasses.replace(SMALL, votes="named")
    found = compare(voted, values)
    scores = [line for line in found if line.get("measure") == "elo"]
    wins = [np.nanmean(values[one]["named"] > values["plain"]["named"]) for one in ("guided", "text")]
    assert [line["arm"] for line in scores] == ["plain", "guided", "text"] and scores[0]["n"] == 60 * 2 * 3 - 2
    for line, share in zip(scores[1:], wins, strict=True):
        assert chance(line["value"] - scores[0]["value"]) == pytest.approx(share, abs=0.08)
        assert line["low"] < line["value"] < line["high"]
    table = experiment.table(voted, found)
    assert "| Elo by named factors |" in table and f"| {scores[2]['value']:.0f} [" in table
    assert not [line for line in compare(SMALL, values) if line.get("measure") == "elo"]
    values["text"]["named"] += 100  # it never loses
    assert [line["value"] for line in compare(voted, values) if line.get("measure") == "elo"] == [None] * 3
    assert "| — |" in experiment.table(voted, compare(voted, values))


def test_the_verdict_of_all_claims():
    assert verdict(results(0.3, 0.2)) == "reproduced"
    assert verdict(results(0.3, -0.2)) == "in part"
    assert verdict(results(-0.3)) == "not reproduced"
    assert verdict(results(-0.3, 0.0)) == "not reproduced"
    found = results(-0.3, 0.3, -0.3, ours=(1, 2))
    assert [line["verdict"] for line in found if "claim" in line] == ["not reproduced", "holds", "does not hold"]
    assert verdict(found) == "not reproduced", "of the paper's claim alone"
