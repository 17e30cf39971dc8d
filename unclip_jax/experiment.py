"""Runs an experiment: trains what its arms lack, draws, measures, compares, and says which claims hold.

    python -m unclip_jax.experiment prior_purpose --workdir runs/experiments
    python -m unclip_jax.experiment --list

An experiment is a file, experiments/NAME/experiment.py, of arms, measures and claims of a paper; another file may be
given by its path. WORKDIR keeps models, drawings and measurements, and is shared by all experiments: no model is
trained twice, and stopped by Ctrl-C, SIGTERM or a crash, the same command goes on. WORKDIR/NAME gets results.jsonl,
figure.svg and results.md; --publish writes them beside experiment.py too. Each number has its 95 % interval, by a
bootstrap over training seeds, captions and pictures.
"""

import argparse
import dataclasses
import importlib.util
import io
import json
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unclip_jax import cli, train
from unclip_jax.errors import UserError
from unclip_jax.paths import output_folder, to_path, write_bytes

if TYPE_CHECKING:
    from unclip_jax.trials import Experiment, Lab

FILE, RESULTS, FIGURE, TABLE = "experiment.py", "results.jsonl", "figure.svg", "results.md"
CORE = 40e9  # FLOPs that a CPU core does in a second in training: an AMD EPYC's, measured
PUBLISHED = (RESULTS, FIGURE, TABLE)


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line. Raises UserError for what is wrong with it."""
    parser = cli.Parser("experiment", __doc__)
    text = "experiment, as of --list, or the path of a file of one; NAME:small and NAME:paper are larger"
    parser.add_argument("name", nargs="?", help=text)
    parser.add_argument("--list", action="store_true", help="list the experiments, with their questions")
    parser.add_argument("--workdir", help="folder for models, drawings and results, shared by all experiments")
    parser.add_argument("--data-dir", help="folder of the datasets; default: WORKDIR/data")
    parser.add_argument("--captions", type=cli.whole(1, 1920), help="as many captions, instead of the experiment's")
    parser.add_argument("--draws", type=cli.whole(1, 100), help="as many pictures of each, instead of the experiment's")
    text = "train each model for this many steps only, to try everything out"
    parser.add_argument("--steps", type=cli.whole(1, 10**10), help=text)
    parser.add_argument("--cost", action="store_true", help="say what its training costs, and end")
    parser.add_argument("--publish", action="store_true", help="write the results beside experiment.py too")
    args = parser.parse_args(argv[1:])
    if not args.list and not args.name:
        raise UserError("no experiment: name one of --list")
    if not args.list and not args.workdir:
        raise UserError("no --workdir: give a folder for models and results, such as --workdir runs/experiments")
    if args.publish and (args.steps or args.captions or args.draws):
        raise UserError("--publish goes with the whole experiment: leave out --steps, --captions and --draws")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.list:
        print(overview())
        return 0
    from unclip_jax.trials import Lab, Stopped, compare, verdict

    path, size = find(args.name)
    name = path.stem if path.name != FILE else path.resolve().parent.name
    if args.publish and (Path(__file__).parent / "experiments").is_dir():
        raise UserError("--publish writes beside experiment.py, for a checkout: this package is installed from a wheel")
    given = {name: getattr(args, name) for name in ("captions", "draws") if getattr(args, name)}
    experiment = dataclasses.replace(load(path), **given, **({"size": size} if size else {}))
    workdir = output_folder(args.workdir, "--workdir")
    cli.enable_compilation_cache()
    lab = Lab(experiment, workdir, args.data_dir or str(workdir / "data"), args.steps)
    print(cost(lab), file=sys.stderr, flush=True)
    if args.cost:
        return 0
    began, values = time.monotonic(), {}
    for i, arm in enumerate(experiment.arms):
        print(f"[{i + 1}/{len(experiment.arms)}] {arm.label}", file=sys.stderr, flush=True)
        try:
            values[arm.name] = lab.run(arm)
        except Stopped as stopped:
            return train.exit_status(stopped.by)
    results = [*compare(experiment, values), {"minutes": round(lab.seconds / 60, 1)}]
    content = {
        RESULTS: "".join(f"{json.dumps(line)}\n" for line in results).encode(),
        FIGURE: figure(experiment, results),
        TABLE: table(experiment, results).encode(),
    }
    folders = [workdir / name, *([path.parent] if args.publish else [])]
    for folder in folders:
        for file in PUBLISHED:
            write_bytes(folder / file, content[file])
    print(content[TABLE].decode())
    print(f"{verdict(results)}, after {(time.monotonic() - began) / 60:.1f} minutes: {folders[-1]}", file=sys.stderr)
    return 0


def find(name: str) -> tuple[Path, str]:
    """Finds the file of an experiment, by its name or its path on a disk, since it is run; and the size after a colon,
    "" where there is none. Raises UserError where there is no such file."""
    plain, _, size = name.partition(":")
    if "/" in size:
        raise UserError(f"{name}: an experiment is a program, which is run from a disk alone: copy it there first")
    name, path = plain, to_path(plain)
    if path.suffix == ".py" and path.is_file():
        return path, size
    if (path := _folder() / name / FILE).is_file():
        return path, size
    known = ", ".join(sorted(path.parent.name for path in _folder().glob(f"*/{FILE}")))
    raise UserError(f"no experiment {name!r}: expected one of {known}, or the path of a file of one")


def load(path: Path) -> "Experiment":
    """Runs the file of an experiment, which defines EXPERIMENT. Raises UserError where it does not."""
    spec = importlib.util.spec_from_file_location(f"experiment_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "EXPERIMENT"):
        raise UserError(f"{path} defines no EXPERIMENT: see experiments/README.md")
    return module.EXPERIMENT


def cost(lab: "Lab") -> str:
    """Says which models an experiment is going to train, and how much work that is, by the plan of each."""
    import jax

    from unclip_jax.planning.chips import CHIPS
    from unclip_jax.planning.programs import checked_stage, train_step_flops

    work, names = 0, []
    for name, config in lab.missing():
        names.append(name)
        shapes = jax.eval_shape(checked_stage(config).init, jax.random.key(0))
        work += config.train.steps * train_step_flops(config, shapes)
    if not names:
        return "nothing is to be trained"
    counted = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    chips = work / (CHIPS["v5p"].peak_flops / 2) / 3600
    hours = f"{chips:,.0f} chip-hours of TPU v5p at half its peak"
    if chips < 1:
        hours = f"{work / CORE / 3600:.1f} core-hours of a CPU"
    return f"to be trained: {counted}; {work:.2g} FLOPs, or {hours}"


def overview() -> str:
    """Lists the experiments as a table of Markdown, with the verdicts that were published and the minutes that drawing
    and measuring took."""
    from unclip_jax.trials import verdict

    lines = [_row("experiment", "question", "of", "claims", "verdict", "minutes"), _row(*["---"] * 6)]
    for path in sorted(_folder().glob(f"*/{FILE}")):
        experiment, results = load(path), path.with_name(RESULTS)
        found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        said = verdict(found) if found else "not run yet"
        minutes = "".join(f"{line['minutes']:g}" for line in found if "minutes" in line)
        about = experiment.question, experiment.paper, str(len(experiment.claims))
        lines.append(_row(f"[{path.parent.name}]({path.parent.name})", *about, said, minutes))
    return "\n".join(lines)


def table(experiment: "Experiment", results: Sequence[Mapping[str, Any]]) -> str:
    """Writes results as two tables of Markdown: arms with their measures, and claims with their verdicts."""
    lines = [_row("arm", *experiment.shown.values()), _row(*["---"] * (1 + len(experiment.shown)))]
    for arm in experiment.arms:
        found = {line["measure"]: line for line in results if line.get("arm") == arm.name}
        lines.append(_row(arm.label, *(_number(found[name]) for name in experiment.shown)))
    labels = {arm.name: arm.label for arm in experiment.arms}
    lines += ["", _row("claim", "difference", "of", "n", "verdict"), _row(*["---"] * 5)]
    for line in results:
        if "claim" in line:
            measure = experiment.measures.get(line["measure"], line["measure"])
            of = f"{measure}: {labels[line['larger']]} − {labels[line['smaller']]}"
            said = f"ours: {line['verdict']}" if line["ours"] else line["verdict"]
            lines.append(_row(line["claim"], _number(line), of, f"{line['n']:,}", said))
    trainings = "one training run of each model"
    if experiment.seeds > 1:
        trainings = f"{experiment.seeds} training runs of what arms train"
    each = "one picture" if experiment.draws == 1 else f"{experiment.draws} pictures"
    drawn = f"{experiment.captions} captions, {each} of each"
    counted = drawn if "decoder" in experiment.models else f"{experiment.captions} pictures"
    lines += ["", f"{counted}, {trainings}."]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _number(line: Mapping[str, Any]) -> str:
    digits = 0 if line["measure"] == "elo" else 3
    parts = (line[name] for name in ("value", "low", "high"))
    value, low, high = ("—" if part is None else f"{part:.{digits}f}" for part in parts)
    return value if value == "—" else f"{value} [{low}, {high}]"


def figure(experiment: "Experiment", results: Sequence[Mapping[str, Any]]) -> bytes:
    """Draws the measures of the arms with their intervals as SVG: a panel for each, over x or arm by arm."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # The same results give the same file; letters stay text, which keeps it small.
    matplotlib.rcParams |= {"svg.hashsalt": "unclip_jax", "svg.fonttype": "none"}
    over_x = all(arm.x is not None for arm in experiment.arms)
    count, labels = len(experiment.shown), [arm.label for arm in experiment.arms]
    size = (3.2 * count, 2.8) if over_x else (2.6 * count + 1.5, 0.32 * len(labels) + 1.2)
    figure, panels = plt.subplots(1, count, figsize=size, layout="constrained", sharey=not over_x, squeeze=False)
    for panel, (name, label) in zip(panels[0], experiment.shown.items(), strict=True):
        lines = {line["arm"]: line for line in results if line.get("measure") == name and "arm" in line}
        for series in dict.fromkeys(arm.series for arm in experiment.arms):
            arms = [(at, arm) for at, arm in enumerate(experiment.arms) if arm.series == series]
            found = [[lines[arm.name][part] for _, arm in arms] for part in ("value", "low", "high")]
            value, low, high = np.array(found, np.float64)  # None becomes NaN, which is not drawn
            bars = np.abs([low - value, high - value])
            if over_x:
                panel.errorbar([arm.x for _, arm in arms], value, yerr=bars, marker="o", capsize=3, label=series)
            else:
                panel.errorbar(value, [at for at, _ in arms], xerr=bars, fmt="o", capsize=3)
        if over_x:
            panel.set(xlabel=experiment.axis, ylabel=label)
            least, most = (end(arm.x for arm in experiment.arms) for end in (min, max))
            if least > 0 and most >= 8 * least:
                panel.set_xscale("log", base=2)
                panel.xaxis.set_major_formatter("{x:g}")
        else:
            panel.set(xlabel=textwrap.fill(label, 28), yticks=range(len(labels)), yticklabels=labels)
            panel.margins(y=0.15)
    if not over_x:
        panels[0][0].invert_yaxis()
    elif experiment.arms[0].series:
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=count)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()


def _folder() -> Path:
    """Returns the folder of the experiments that come with this package: in a checkout, or inside a wheel."""
    package = Path(__file__).parent
    inside = package / "experiments"
    return inside if inside.is_dir() else package.parent / "experiments"


if __name__ == "__main__":
    cli.run(main)
