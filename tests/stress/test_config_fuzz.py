"""Every key of every config with odd values, from the command line and from a file: refused in one line, or it works.

`UNCLIP_FUZZ_CASES` is the number of cases that are tried of each config, drawn by a seed; all are about 1,400 of each.
`JAXTYPING_DISABLE=1` leaves out the checks of shapes, which are half of the time.
"""

import collections
import contextlib
import io
import json
import math
import os
import random

import jax
import pytest
from shrink import CONFIGS, leaves, save_pictures, small_config

from unclip_jax import cli
from unclip_jax.config_checks import check_config, embedded
from unclip_jax.errors import UserError
from unclip_jax.stages import make_stage
from unclip_jax.training.sharding import make_mesh
from unclip_jax.training.state import abstract_state, make_train_step, root_key

pytestmark = pytest.mark.stress
CASES = int(os.environ.get("UNCLIP_FUZZ_CASES", "60"))
NAN, INF = math.nan, math.inf
LINE = {
    bool: ["maybe", "2", "", "None"],
    int: ["0", "-1", "2", "7", "1000000000000000000", "1.5", "abc", "", "nan", "None", "1e3"],
    float: ["0", "-1", "2", "nan", "inf", "1e300", "abc", "", "None"],
    str: ["", "nonsense", "../../x", "None", "0", "a" * 5000],
    tuple: ["()", "(0,)", "(-1,)", "(2,)", "('a',)", "(1e999,)", "5", "abc", "(1,2,3,4,5,6,7)", "((1,),)"],
}
FILE = {
    bool: [None, 0, 2, "no", [], NAN],
    int: [None, "7", [], {}, 2.5, NAN, INF, True, -3, 0, 3],
    float: [None, "0.5", [], {}, NAN, INF, -2.0, True, 1],
    str: [None, 5, [], {}, NAN, True],
    tuple: [None, 5, "x", {}, [None], [NAN], [[1]], [3, 1, 2]],
}


def cases(name, folder):
    """(config's file, its description, key, how it is given, value), in random order."""
    config = small_config(name).unlock()
    config.data.update(dict(source=f"folder:{save_pictures(folder / 'pictures')}", threads=1))
    if "clip" in config:
        config.clip.bundle = "clip"
    path, description, found = folder / f"{name}.json", config.to_dict(), []
    path.write_text(json.dumps({"config": description}))
    for key, value in leaves(config).items():
        found += [(path, description, key, "line", odd) for odd in LINE[type(value)]]
        found += [(path, description, key, "file", odd) for odd in FILE[type(value)]]
    random.Random(0).shuffle(found)
    return found


def parsed(path, description, key, given, value):
    argv = ["train", f"--config={path}", f"--config.{key}={value}"]
    if given == "file":
        changed = json.loads(json.dumps(description))
        *sections, last = key.split(".")
        node = changed
        for section in sections:
            node = node[section]
        node[last] = value
        odd = path.with_name("odd.json")
        odd.write_text(json.dumps({"config": changed}))
        argv = ["train", f"--config={odd}"]
    return cli.parse(argv, {}).config


def outcome(case, clip, workdir):
    """"refused", or "works" where the state and the train step can be built and traced; and what was said."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            config = parsed(*case)
            check_config(config, workdir)
            mesh = make_mesh(config.mesh)
            stage = make_stage(config, clip if "clip" in config else None, embedded(config))
            root = root_key(config.train.seed)
            state = abstract_state(stage, config, mesh)
            step = make_train_step(stage, config, mesh)
            frozen = jax.eval_shape(clip.init, jax.random.key(0)) if stage.runs_clip else {}
            if config.train.batch_size <= 64:
                jax.eval_shape(step, state, frozen, stage.batch_spec(config.train.batch_size), root)
        return "works", ""
    except UserError as error:
        return ("refused" if "\n" not in str(error) else "several lines"), str(error)
    except (SystemExit, MemoryError, Exception) as error:
        return "traceback", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@pytest.mark.parametrize("name", CONFIGS)
def test_odd_values_are_refused_in_one_line_or_work(name, tmp_path, record_property):
    clip, found = make_stage(small_config("clip")), cases(name, tmp_path)
    counts, wrong = collections.Counter(), []
    for case in found[:CASES]:
        result, said = outcome(case, clip, str(tmp_path / "run"))
        counts[result] += 1
        if result not in ("works", "refused"):
            wrong.append(f"{name} {case[2]} {case[3]} {case[4]!r:.60}: {said}")
    record_property("counts", json.dumps(dict(counts)))
    print(f"{name}: {counts.total()} of {len(found)} cases: {dict(counts)}")
    assert not wrong, "\n".join(wrong[:60])
