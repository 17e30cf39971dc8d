"""Experiments: arms that differ in how models are trained or drawn from, and what is measured of the pictures.

An experiment is a value, `EXPERIMENT` in experiments/NAME/experiment.py. An arm says only what is other than in the
cascade of the configs of size "shipped". `Lab` trains what an arm lacks: a model is known by a digest of its config and
of its CLIP, so nothing is trained twice, by any experiment, nor what comes with this package. What was drawn and
measured is kept in the same folder too, so an experiment that was stopped goes on where it was.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from unclip_jax import __version__, cli, shipped, train
from unclip_jax.bundle import CONFIG, load_description
from unclip_jax.cascade import Cascade
from unclip_jax.chain import PRIORS, UPSAMPLERS
from unclip_jax.config import flat_items
from unclip_jax.data import varied_scenes
from unclip_jax.drawing import draw_file
from unclip_jax.errors import UserError
from unclip_jax.evaluation import comparisons, factor_scores, factor_values, factors
from unclip_jax.evaluation.intervals import Result
from unclip_jax.evaluation.preferences import Vote, elo_scores
from unclip_jax.evaluation.reading import read_pictures
from unclip_jax.model import Model
from unclip_jax.paths import to_path, write_bytes

CONFIGS = {  # model of a cascade → its config, where an arm names no other
    "clip": "clip", "prior": "prior_diffusion", "decoder": "decoder", "noised_clip": "clip_noised",
    "upsampler_256": "upsampler_256", "upsampler_1024": "upsampler_1024",
}  # fmt: skip
# Keys that say where a run's data and CLIP lie or how it is done, not what comes of it.
UNTOLD = ("data.data_dir", "data.threads", "data.workers", "clip.", "mesh.", "train.log_every", "train.checkpoint_",
          "train.keep", "train.watchdog_minutes", "train.expected_loss", "train.sample_every", "train.measure",
          "train.draw_size")  # fmt: skip
SIZES = ("shipped", "small", "paper")
ELO = "elo"  # name of the scores that come of votes
# What models of the larger sizes learn here too, with a vocabulary that its captions can fill.
SCENES = {"data.source": "tfds:emoji_scenes/varied_256", "data.crop": "center", "model.vocab_size": 1024,
          "model.text.vocab_size": 1024}  # fmt: skip
READERS = factors.__file__, factor_scores.__file__, factor_values.__file__
Values = Mapping[str, np.ndarray]  # measure → (captions, draws), NaN where a picture has no value


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of training and drawing.

    name: short, for files. label: for tables and figures. configs: model → config by which it is trained instead of
    that of `CONFIGS`, such as "prior": "prior_ar". changes: model → key of its config → value. sampling: of "decoder"
    or "prior", values of that section of its config. options: of `Cascade.generate`, such as guidance_scale. x: where
    the arm stands on a figure's axis, if arms differ by a number; series: the line that it is a point of.
    """

    name: str
    label: str
    configs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    x: float | None = None
    series: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence of a paper that is true of these arms if `measure` is larger for one than for the other. One of `ours`
    is in no paper, and does not count in the experiment's verdict."""

    text: str
    measure: str
    larger: str
    smaller: str
    ours: bool = False


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A question, the arms that answer it, and the claims that it tries.

    paper: where the claims stand, such as "unCLIP, section 5.1, figure 8". models: of each arm's cascade. measures:
    name → label of what tables and figures show. captions: how many, of those that were held out. draws: pictures of
    each. seeds: how often models are trained, each time by another seed: those that an arm changes, and for every arm
    those in `seeded`. size: of the configs, one of `SIZES`. short: model → key of its config → value, for models that
    an arm changes, at size "shipped" alone, so that two CPU cores train them soon. measure: what is measured of an
    arm's cascade. votes: the measure by which an oracle votes between two arms' pictures for a caption; Elo scores come
    of it. axis: name of the arms' x.
    """

    question: str
    paper: str
    models: tuple[str, ...]
    arms: tuple[Arm, ...]
    measures: Mapping[str, str]
    claims: tuple[Claim, ...]
    captions: int = 512
    draws: int = 4
    seeds: int = 1
    seeded: tuple[str, ...] = ()
    size: str = "shipped"
    short: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    measure: "Callable[[Lab, Cascade, Arm], Values]" = lambda lab, cascade, arm: lab.scene_values(cascade, arm)
    votes: str = ""
    axis: str = ""

    @property
    def shown(self) -> dict[str, str]:
        """Name → label of all that tables and figures show of an arm."""
        return {**self.measures, **({ELO: f"Elo by {self.measures[self.votes]}"} if self.votes else {})}

    def __post_init__(self) -> None:
        """Raises UserError for arms, models, measures and claims that do not go together."""
        names = [arm.name for arm in self.arms]
        _known("the name of an arm, which another has", [name for name in names if names.count(name) > 1], ())
        _known("a model", self.models, CONFIGS)
        _known("no size", [self.size], SIZES)
        if "decoder" not in self.models and self.measure.__module__ == __name__:
            raise UserError(f"models are {', '.join(self.models)}: an experiment that draws needs a decoder")
        for arm in self.arms:
            _known(f"a model that arm {arm.name} changes", [*arm.configs, *arm.changes], self.models)
            sampled = {"decoder", "prior"} & {*self.models}
            _known(f"a model that arm {arm.name} samples otherwise", arm.sampling, sampled)
        _known("the measure of votes", filter(None, [self.votes]), self.measures)
        for claim in self.claims:
            _known("an arm of a claim", (claim.larger, claim.smaller), names)
            _known("the measure of a claim", [claim.measure], self.measures)


def _known(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raises UserError for the first name that is none of those expected."""
    for name in found:
        if name not in expected:
            raise UserError(f"{name!r} is {what}: expected one of {', '.join(expected) or 'no two alike'}")


class Lab:
    """Trains, draws and measures for one experiment, below a folder that all experiments share.

    data_dir: where datasets are drawn. steps: train each model for so many steps only, to try everything out.
    """

    def __init__(self, experiment: Experiment, workdir: Path, data_dir: str, steps: int | None = None):
        self.experiment, self.workdir = experiment, workdir
        self._data_dir, self._steps = data_dir, steps
        self._encoded: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
        self.seconds = 0.0  # that drawing and measuring took, of all that was run, also by earlier processes
        self.scenes, self.named, self.captions = zip(
            *(varied_scenes.scene_at("test", index) for index in range(experiment.captions)), strict=True
        )

    def run(self, arm: Arm) -> dict[str, np.ndarray]:
        """Returns each measure's values of an arm, (training seeds, captions, draws). An arm of which nothing is
        trained by several seeds has one."""
        found = [dict(self._values(arm, seed)) for seed in self._seeds(arm)]
        self.seconds += sum(float(values.pop("seconds")) for values in found)
        return {name: np.stack([values[name] for values in found]) for name in found[0]}

    def cascade(self, arm: Arm, seed: int = 0) -> Cascade:
        """Loads the cascade of an arm, and trains what is missing of it. seed: of the models that the arm changes or
        that the experiment trains by several seeds."""
        configs = self._configs(arm, seed)
        clip, clip_folder = None, None
        if "clip" in configs:
            clip_folder = self.bundle(configs.pop("clip"))
            clip = Model.load(clip_folder, ("clip",))

        def load(name: str, *stages: str) -> Model | None:
            return Model.load(self.bundle(configs[name], clip_folder), stages, clip) if name in configs else None

        prior, decoder = load("prior", *PRIORS), load("decoder", "decoder", "glide")
        upsamplers = [load(name, "upsampler", "glide") for name in UPSAMPLERS if name in configs]
        cascade = Cascade(clip, prior, decoder, upsamplers, load("noised_clip", "clip"))
        sampling = arm.sampling.get("decoder", {}), arm.sampling.get("prior", {})
        return cascade.sampled_by(*sampling) if arm.sampling else cascade

    def missing(self) -> list[tuple[str, ConfigDict]]:
        """Lists the models that are to be trained, each once, by their names and configs."""
        found: dict[str, tuple[str, ConfigDict]] = {}
        for arm in self.experiment.arms:
            for seed in self._seeds(arm):
                configs = self._configs(arm, seed)
                clip = self._stored(configs["clip"], None) if "clip" in configs else None
                for name, config in configs.items():
                    # Without its CLIP a model cannot have been trained.
                    if ("clip" in config and not clip) or not self._stored(config, clip):
                        found[_hash([name, *flat_items(config)])] = name, config
        return list(found.values())

    def config(self, arm: Arm, name: str, seed: int = 0) -> ConfigDict:
        """Makes the config of a model of an arm. Raises UserError for a key that it does not have."""
        spec = f"configs/{arm.configs.get(name, CONFIGS[name])}.py:{self.experiment.size}"
        config = cli.load_config(spec).copy_and_resolve_references().unlock()
        known = dict(flat_items(config))
        if self.experiment.size != "shipped":
            config.update_from_flattened_dict({key: value for key, value in SCENES.items() if key in known})
            if name == "upsampler_1024":
                config.data.source = config.data.source.replace("256", "1024")
        changes = arm.changes.get(name, {})
        if changes and self.experiment.size == "shipped":
            changes = {**self.experiment.short.get(name, {}), **changes}
        for key, value in changes.items():
            if key not in known:
                raise UserError(f"arm {arm.name} changes {key}, which {spec} does not have")
            config.update_from_flattened_dict({key: value})
        config.data.data_dir = self._data_dir
        if name in (*arm.changes, *arm.configs, *self.experiment.seeded):
            config.train.seed += seed
        if self._steps:  # everything is to be quick, the search for a prior's analytic variances too
            config.train.steps, config.train.eval_size, config.train.draw_size = self._steps, 8, 8
            if config.stage == "prior_diffusion":
                config.sampling.sampler, config.sampling.steps = "ddim", "4"
        return config.lock()

    def bundle(self, config: ConfigDict, clip: Path | None = None) -> Path:
        """Returns the folder of the model that a config gives: that of this package, or else its own. Trains it first
        where there is none.

        clip: the bundle for config.clip. Raises Stopped where a signal stopped the training.
        """
        if found := self._stored(config, clip):
            return found
        folder = self._folder(config)
        print(f"training {folder.name}", file=sys.stderr, flush=True)
        report = train.run(config, str(folder))
        if isinstance(report, signal.Signals):
            raise Stopped(report)
        jax.clear_caches()  # the programs of several trainings would fill the memory
        return folder / "bundle"

    def draw(self, cascade: Cascade, arm: Arm) -> np.ndarray:
        """Draws the captions, or reads what was drawn before: uint8 (captions, draws, R, R, 3)."""
        about = {"models": cascade.identities(), "sampling": _plain(arm.sampling), "options": _plain(arm.options)}
        key = _hash(about | {"captions": len(self.captions), "draws": self.experiment.draws})
        folder = self.workdir / "drawn" / key[:12]
        settings = about | {"bundle": "", "version": __version__}
        draw_file(cascade, self.captions, folder, self.experiment.draws, 0, arm.options, settings, "tar")
        images = np.stack([picture.image for picture in read_pictures(str(folder), None)])
        return images.reshape(len(self.captions), self.experiment.draws, *images.shape[1:])

    def pictures(self) -> list[np.ndarray]:
        """Renders the scenes of the captions: uint8 (64, 64, 3) each."""
        return [varied_scenes.render(scene, varied_scenes.FRAME) for scene in self.scenes]

    def encoded(self, cascade: Cascade, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Encodes the scenes' pictures by `Cascade.encode`, once for all arms of the same models."""
        key = steps, *sorted(cascade.identities().items())
        if key not in self._encoded:
            self._encoded[key] = cascade.encode(self.pictures(), steps)
        return self._encoded[key]

    def scene_values(self, cascade: Cascade, arm: Arm) -> Values:
        """Draws the captions and computes `factor_values.scene_values` of the pictures."""
        images = self.draw(cascade, arm)
        reading = factors.read(images.reshape(-1, *images.shape[2:]))
        return factor_values.scene_values(reading, self.scenes, self.named)

    def _seeds(self, arm: Arm) -> range:
        """Numbers the trainings of an arm."""
        return range(self.experiment.seeds if {*self.experiment.seeded, *arm.changes, *arm.configs} else 1)

    def _configs(self, arm: Arm, seed: int) -> dict[str, ConfigDict]:
        """Makes the configs of the models of an arm. A GLIDE has neither CLIP nor prior."""
        configs = {name: self.config(arm, name, seed) for name in self.experiment.models}
        if "decoder" in configs and configs["decoder"].stage == "glide":
            configs = {name: config for name, config in configs.items() if name not in ("clip", "prior")}
        return configs

    def _stored(self, config: ConfigDict, clip: Path | None) -> Path | None:
        """Finds the bundle of a model that is trained; None where there is none yet. Names the CLIP in its config."""
        if "clip" in config:
            with config.unlocked():
                config.clip.bundle = str(clip)
        own = self._folder(config) / "bundle"
        return shipped.find(digest(config)) or (own if (own / CONFIG).exists() else None)

    def _folder(self, config: ConfigDict) -> Path:
        return self.workdir / "runs" / f"{config.stage}-{digest(config)[:12]}"

    def _values(self, arm: Arm, seed: int) -> Values:
        """Returns the values of an arm with models trained by `seed`, which are kept in a file, and the "seconds" that
        they took."""
        cascade = self.cascade(arm, seed)
        key = _hash([cascade.identities(), _plain(arm.sampling), _plain(arm.options), arm.name, self._about()])
        path = self.workdir / "values" / f"{arm.name}-{key[:12]}.npz"
        if not path.exists():
            packed, began = io.BytesIO(), time.monotonic()
            values = self.experiment.measure(self, cascade, arm)
            np.savez_compressed(packed, **values, seconds=np.float64(time.monotonic() - began))
            write_bytes(path, packed.getvalue())
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def _about(self) -> list[Any]:
        """Collects what else values depend on: the code that measures too, by the files that it stands in."""
        e = self.experiment
        code = b"".join(to_path(file).read_bytes() for file in (e.measure.__code__.co_filename, __file__, *READERS))
        return [e.captions, e.draws, e.measure.__qualname__, hashlib.sha256(code).hexdigest(), __version__]


def trained_already(experiment: Experiment, workdir: Path, data_dir: str) -> Experiment:
    """Leaves out the arms of an experiment that have models to be trained, and the claims on such arms."""

    def there(arm: Arm) -> bool:
        return not Lab(dataclasses.replace(experiment, arms=(arm,), claims=()), workdir, data_dir).missing()

    arms = tuple(filter(there, experiment.arms))
    names = {arm.name for arm in arms}
    claims = tuple(claim for claim in experiment.claims if {claim.larger, claim.smaller} <= names)
    return dataclasses.replace(experiment, arms=arms, claims=claims)


class Stopped(Exception):
    """A signal stopped a training, which is saved."""

    def __init__(self, by: signal.Signals):
        super().__init__(by.name)
        self.by = by


def digest(config: ConfigDict) -> str:
    """Computes a digest of all keys of a config that change what is trained, and of the bundles in clip.bundle and
    init.bundle."""
    told = {key: value for key, value in flat_items(config) if not key.startswith(UNTOLD)}
    clip = load_description(to_path(config.clip.bundle))["identity"] if "clip" in config else ""
    if config.init.bundle:
        told["init.bundle"] = load_description(to_path(config.init.bundle))["identity"]
    return _hash([told, clip])


def compare(experiment: Experiment, values: Mapping[str, Values]) -> list[dict[str, Any]]:
    """Computes the mean of each arm's measures, its Elo score where there are votes, and for each claim the difference
    and a verdict, as JSON objects.

    values: arm → measure → (seeds, captions, draws). The verdict is "reproduced" where the interval of the difference
    is above 0, "not reproduced" where it is below, and else "cannot tell"; on a claim of ours "holds", or "does not
    hold".
    """
    found, scores = [], _elo(experiment, values)
    for place, arm in enumerate(experiment.arms):
        results = [comparisons.mean(measure, values[arm.name][measure]) for measure in experiment.measures]
        about = {"arm": arm.name} | ({} if arm.x is None else {"x": arm.x})
        found += [about | _line(result) for result in (*results, *scores[place : place + 1])]
    for claim in experiment.claims:
        pair = (values[name][claim.measure] for name in (claim.larger, claim.smaller))
        result = comparisons.difference(claim.measure, *pair)
        yes, no = ("holds", "does not hold") if claim.ours else ("reproduced", "not reproduced")
        verdict = yes if result.low > 0 else no if result.high < 0 else "cannot tell"
        about = {"claim": claim.text, "larger": claim.larger, "smaller": claim.smaller, "ours": claim.ours}
        found.append(about | _line(result) | {"verdict": verdict})
    return found


def _elo(experiment: Experiment, values: Mapping[str, Values]) -> list[Result]:
    """Computes the Elo score of each arm where there are votes: of two arms' pictures for a caption, the one with the
    larger value wins. A bootstrap draws captions. NaN where some arm never lost."""
    votes, names = [], [arm.name for arm in experiment.arms]
    for one, other in itertools.combinations(names if experiment.votes else (), 2):
        gaps = values[one][experiment.votes] - values[other][experiment.votes]
        for (_, caption, _), gap in np.ndenumerate(gaps):
            if np.isfinite(gap):
                votes.append(Vote(caption, one, other, "left" if gap > 0 else "right" if gap < 0 else "tie"))
    try:
        return [result._replace(name=ELO) for result in elo_scores(votes, names)] if votes else []
    except UserError:
        return [Result(ELO, *[float("nan")] * 3, len(votes), {}) for _ in names]


def verdict(results: Sequence[Mapping[str, Any]]) -> str:
    """Sums up the verdicts on the papers' claims: that of all, else "in part" where one is reproduced, or "not
    reproduced"."""
    found = {line["verdict"] for line in results if "verdict" in line and not line["ours"]}
    if len(found) == 1:
        return found.pop()
    return "in part" if "reproduced" in found else "not reproduced"


def _line(result: Result) -> dict[str, Any]:
    values = {name: getattr(result, name) for name in ("value", "low", "high")}
    numbers = {name: round(value, 4) if np.isfinite(value) else None for name, value in values.items()}
    return {"measure": result.name} | numbers | {"n": result.n} | result.card


def _plain(given: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(given, sort_keys=True))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
