"""The command `plan`: what it refuses, what it prints, and what it measures here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.experimental import topologies
from shrink import small_config

from unclip_jax import cli, plan
from unclip_jax.errors import UserError
from unclip_jax.paths import to_path, write_bytes
from unclip_jax.planning import chips, compiling, cost, programs, report
from unclip_jax.planning.chips import GIB
from unclip_jax.planning.compiling import Compiled, TooLarge
from unclip_jax.planning.estimate import estimate, mfu
from unclip_jax.planning.memory import resident_bytes
from unclip_jax.planning.traffic import Collective

ROOT = Path(__file__).parent.parent
CLIP, DECODER = "--config=configs/clip.py:tiny", "--config=configs/decoder.py:tiny"
PROMISED = {"params", "chips", "hbm_gib_per_chip", "hbm_limit_gib", "fits", "tflops_per_chip_step", "step_seconds"}
PROMISED |= {"mfu", "compile_seconds"}


def not_there(*_, **__):
    raise NotImplementedError("topology not implemented for cuda")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([CLIP, "--topology=v9:2x2"], "topology 'v9:2x2': expected local, one of v4, v5e, v5p, v6e with a shape"),
        ([CLIP, "--topology=b100:1"], "or one of t4, l4, a100, h100, h200 with a number, such as h100:8"),
        ([CLIP, "--topology=v5p"], "expected 3 sizes for v5p, such as v5p:4x4x4"),
        ([CLIP, "--topology=v5p:4x4"], "expected 3 sizes for v5p"),
        ([CLIP, "--topology=v5e:4x4x4"], "expected 2 sizes for v5e"),
        ([CLIP, "--topology=v5e:4x0"], "expected 2 sizes for v5e"),
        ([CLIP, "--topology=v5p:2x2x1"], "the TPU compiler is not installed: pip install 'jax\\[tpu\\]'"),
        ([CLIP, "--topology=h100"], "topology 'h100': expected the number of GPUs of one machine, h100:1 to h100:8"),
        ([CLIP, "--topology=h100:2x4"], "expected the number of GPUs of one machine"),
        ([CLIP, "--topology=l4:0"], "expected the number of GPUs of one machine, l4:1 to l4:8"),
        ([CLIP, "--topology=l4:16"], "expected the number of GPUs of one machine"),
        ([CLIP, "--topology=h100:8"], "the CUDA compiler is not installed: pip install 'unclip_jax\\[cuda\\]'"),
        ([CLIP, "--sample"], "a clip draws nothing"),
        ([CLIP, "--topology=local", "--config.mesh.fsdp=3"], "do not cover 8"),
        ([CLIP, "--topology=local", "--config.train.batch_size=12"], "batch_size=12 cannot be split evenly"),
        ([CLIP, "--config.optim.frozen=('imag',)", "--topology=local"], "no parameter is named 'imag'"),
        ([DECODER, "--config.clip.config=", "--config.model.embedding_dim=63"], "no CLIP of configs/clip.py has"),
        ([DECODER, "--config.clip.bundle=/nowhere"], "no config file /nowhere/config.json"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, says, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)  # as where no accelerator's compiler is installed
    monkeypatch.setattr(topologies, "get_topology_desc", not_there)
    with pytest.raises(UserError, match=says) as caught:
        plan.main(["plan", *arguments])
    assert "\n" not in str(caught.value)


def test_parameters_and_flops_need_no_topology(capsys):
    assert plan.main(["plan", "--config=configs/upsampler_1024.py:paper", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["params"] == sum(found["parts"].values()) == 282_064_326  # ADM's topology, counted by hand
    # Crops of 256 px are a sixteenth of 1024 px, for which GLIDE's code takes 19.84321 TFLOPs; backward is twice that,
    # but for the first convolution; what depends on the timestep alone does not shrink.
    assert found["tflops_per_example"] == pytest.approx(3 * 19.84321 / 16, rel=1e-3)
    lines = report.table(found).splitlines()
    assert ["total", "282,064,326"] in [line.split() for line in lines]
    assert lines[-1].split() == ["TFLOPs", "per", "example", "3.719"]


def test_sampling_is_counted_with_all_its_steps(capsys):
    assert plan.main(["plan", DECODER, "--sample", "--json"]) == 0
    few = json.loads(capsys.readouterr().out)["tflops_per_example"]  # 25 steps
    assert plan.main(["plan", DECODER, "--sample", "--json", "--config.sampling.steps=50"]) == 0
    assert 1.8 < json.loads(capsys.readouterr().out)["tflops_per_example"] / few < 2.0  # captions are read once


@pytest.fixture
def prior(tmp_path):
    """The smallest prior, with the config of the smallest CLIP."""
    (tmp_path / "config.json").write_text(json.dumps({"config": small_config("clip").to_dict()}))
    config = small_config("prior_diffusion").unlock()
    config.clip.bundle = str(tmp_path)
    return config.lock()


def wide(prior, **mesh):
    """With parameters that are worth splitting."""
    config = prior.copy_and_resolve_references().unlock()
    config.model.width = 256
    config.mesh.update(mesh)
    return config.lock()


@pytest.mark.parametrize("sample", [False, True])
def test_local_measures(prior, sample, monkeypatch):
    monkeypatch.setattr(cost, "CHUNK_ROWS", 2)
    found = plan.plan(prior, plan.find_target("local"), sample)
    assert found.keys() >= PROMISED and json.loads(json.dumps(found)) == found
    assert found["estimate"] == "measured" and found["step_seconds"] > 0 and found["fits"]
    assert found["chips"] == 8 and found["mfu"] is None  # nobody says how fast a CPU should be
    assert found["recomputed_tflops_per_chip_step"] == 0
    assert sum(found["memory_gib"].values()) == pytest.approx(found["hbm_gib_per_chip"])
    if not sample:
        assert found["collectives"]["all-reduce"]["count"] > 0 and found["days"] > 0
    text = report.table(found)
    for expected in (f"{found['params']:,}", "fits", "measured", "seconds to compile"):
        assert expected in text


def test_evaluation_is_planned_beside_the_train_state(prior):
    """As many examples as are drawn at once, over the whole mesh, with all that lies on the devices meanwhile."""
    config = wide(prior, fsdp=8)
    with config.unlocked():
        config.train.update(dict(eval_size=64, draw_size=64, batch_size=16))
    found = plan.plan(config, plan.find_target("local"), evaluate=True)
    assert found["batch_size"] == 64 and found["call"] == "evaluating 64 held-out examples" and found["fits"]
    step = plan.plan(config, plan.find_target("local"))
    for part in ("parameters", "moving average", "optimizer"):
        assert found["memory_gib"][part] == step["memory_gib"][part]
    assert found["tflops_per_chip_step"] == pytest.approx(8 * found["tflops_per_example"])
    assert found["collectives"].keys() <= {"all-gather", "all-reduce"} and "all-gather" in found["collectives"]
    assert "evaluating 64 held-out examples on 8 x" in report.table(found)
    with pytest.raises(UserError, match="--evaluate needs a --topology"):
        plan.main(["plan", "--config=configs/decoder.py:tiny", "--evaluate"])


def test_sampling_is_planned_for_all_devices_of_one_host(prior, monkeypatch):
    """On what four hosts of two devices would be: one host's program, and the pictures of all."""
    hosts = [SimpleNamespace(process_index=i // 2, platform="cpu", here=here) for i, here in enumerate(jax.devices())]
    real = programs.sample_program

    def on_local_devices(config, devices, rows):
        return real(config, [getattr(device, "here", device) for device in devices], rows)

    monkeypatch.setattr(cost, "sample_program", on_local_devices)
    monkeypatch.setattr(cost, "CHUNK_ROWS", 4)
    target = cost.Target("v5p", "v5p:2x2x2", hosts, chips.CHIPS["v5p"], 10 * GIB)
    whole, split = (plan.plan(wide(prior, fsdp=n), target, sample=True) for n in (1, 2))
    assert whole["batch_size"] == split["batch_size"] == 8 and whole["chips"] == 2 and whole["hosts"] == 4
    assert whole["examples_per_second"] == pytest.approx(4 * 8 / whole["step_seconds"])
    assert whole["tflops_per_chip_step"] == pytest.approx(4 * whole["tflops_per_example"])
    assert not whole["collectives"] and split["collectives"].keys() == {"all-gather"}
    assert split["memory_gib"]["parameters"] < 0.6 * whole["memory_gib"]["parameters"]
    assert "sampling 8 rows on 2 x v5p, one of 4 hosts; on each chip:" in report.table(split)


def test_sharded_state_is_counted_as_it_lies(prior):
    config = wide(prior)
    whole, split = (resident_bytes(programs.train_program(wide(prior, fsdp=n), jax.devices())) for n in (1, 8))
    count = sum(plan.parameters(config).values()) + 1000  # the analytic variances, which are not trained
    assert whole["parameters"] == whole["moving average"] == 4 * count
    assert whole["optimizer"] == 8 * count + 4  # and the number of updates
    assert whole["parameters"] / 8 < split["parameters"] < whole["parameters"] / 2
    assert whole["frozen CLIP"] == split["frozen CLIP"] > 0


def test_what_is_not_trained_takes_no_gradient_moments_or_average(prior):
    plain = resident_bytes(programs.train_program(prior, jax.devices()[:1]))
    shapes = jax.eval_shape(programs.checked_stage(prior).init, jax.random.key(0))
    flops = programs.train_step_flops(prior, shapes)
    for optim in (dict(frozen=("transformer", "tokens")), dict(lora_rank=2)):
        config = prior.copy_and_resolve_references().unlock()
        config.optim.update(optim)
        part = resident_bytes(programs.train_program(config.lock(), jax.devices()[:1]))
        kept = part["moving average"]
        assert part["optimizer"] == 2 * kept + 4 and kept < 0.5 * plain["moving average"]
        # The factors lie beside the parameters.
        assert part["parameters"] == plain["parameters"] + (kept if "lora_rank" in optim else 0)
        assert flops / 2 < programs.train_step_flops(config.lock(), shapes) <= flops


def made_up(**changes):
    memory = {"arguments": 60 * GIB, "outputs": 50 * GIB, "aliased": 49 * GIB, "temporaries": 20 * GIB, "code": GIB}
    given = {"compile_seconds": 1.0, "executed_flops": 40 * 10**12, "memory": memory, "compiler_flops": 1e12}
    given |= {"moved_bytes": 1.0, "collectives": [], "cycles": 0, "kernel_flops": 0, "executable": None}
    return Compiled(**given | changes)


def test_a_step_takes_its_slowest_part():
    chip = chips.Chip(peak_flops=1e13, hbm_gib=90, hbm_bandwidth=1e12, link_bandwidth=1e11, clock_hz=1e9)
    sent = [Collective("all-reduce", "", 1, 2e11), Collective("all-gather", "", 1, 1e11)]
    found = estimate(made_up(moved_bytes=2.5e12, collectives=sent, cycles=2_800_000_000), chip, 2)
    assert found == (2.0, 2.5, 3.0, 2.8) and (found.seconds, found.bound) == (3.0, "collectives")
    assert estimate(made_up(), chip, 2).bound == "compute"
    assert estimate(made_up(cycles=2_800_000_000, kernel_flops=2e12), chip, 2).cycles == 2.8 + 0.4
    assert mfu(15e12, 3.0, chip) == 0.5


def test_a_refusal_tells_how_much_is_missing():
    """Both as libtpu words it: where temporaries alone are too large, and where all is."""
    for message, expected in (
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (312.50G) exceeds available HBM (95.73G). HLO module: jit_step.", 312.5),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 41.22G of 15.75G hbm. Exceeded hbm capacity "
         "by 25.47G.", 41.22),
    ):  # fmt: skip
        assert compiling.needed_bytes(message) == int(expected * GIB)


def test_what_does_not_fit_is_said_with_what_does(prior, monkeypatch):
    """On 8 devices whose compiler, made up, refuses more than a row on each."""
    target = cost.Target("v5p", "local", jax.devices(), chips.CHIPS["v5p"], 10 * GIB)
    monkeypatch.setattr(cost, "time_calls", lambda program, done: [3.0, 1.0, 2.0])
    tried = []

    def fake(program, target, quick):
        tried.append(program.stage.config.optim.accumulate)
        memory = {"arguments": GIB, "outputs": 0, "aliased": 0, "temporaries": GIB, "code": 0}
        return made_up(memory=memory) if tried[-1] == 2 else TooLarge(11 * GIB, 1.0)

    monkeypatch.setattr(cost, "_compiled", fake)
    found = plan.plan(wide(prior), target)
    assert not found["fits"] and found["hbm_gib_per_chip"] == pytest.approx(11)
    assert found["proposal"] == {"optim.accumulate": 2} and found["proposed"]["step_seconds"] == 2.0
    assert "With these flags it does: --config.optim.accumulate=2" in report.table(found) and tried == [1, 2]
    target = target._replace(limit=0)
    found = plan.plan(prior, target)
    assert found["proposal"] == {} and tried == [1, 2]  # its parameters alone are too much: nothing is compiled
    assert "take more chips" in report.table(found)


def test_a_gpu_without_bfloat16_is_planned_in_float32(prior):
    target = cost.Target("t4", "t4:1", jax.devices()[:1], chips.CHIPS["t4"], 10 * GIB)
    config = prior.copy_and_resolve_references().unlock()
    config.dtype = "bfloat16"
    with pytest.raises(UserError, match=r"t4 does not compute in bfloat16: add --config\.dtype=float32"):
        plan.plan(config.lock(), target)
    assert chips.CHIPS["t4"].computing_in("float32").peak_flops == 8.1e12
    assert chips.CHIPS["l4"].computing_in("bfloat16").peak_flops == 121e12
    assert chips.CHIPS["l4"].computing_in("float32").peak_flops == 60e12
    assert chips.CHIPS["v5p"].computing_in("float32").peak_flops == 459e12  # made of bfloat16 products


@pytest.mark.slow
def test_settings_that_fit_are_found_for_tpus():
    """In the words of the compiler; each attempt is a process."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-m", "unclip_jax.plan", "--config=configs/prior_diffusion.py:tiny", "--quick", "--json"]
    arguments = ["--topology=v5e:2x2", "--config.train.batch_size=131072"]
    places = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=places, capture_output=True, text=True, timeout=900)
    found = json.loads(done.stdout)
    assert not found["fits"] and found["hbm_gib_per_chip"] > found["hbm_limit_gib"]
    assert found["proposal"].keys() == {"optim.accumulate"} and found["proposed"]["fits"]
    assert found["proposed"]["seconds"]["cycles"] == 0 < found["proposed"]["step_seconds"]


@pytest.mark.slow
def test_a_train_step_is_compiled_for_tpus(capsys):
    pytest.importorskip("libtpu")
    arguments = ["--topology=v5e:2x2", "--config.train.batch_size=32", "--json"]
    assert plan.main(["plan", "--config=configs/prior_diffusion.py:tiny", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= PROMISED and found["chips"] == 4 and found["fits"]
    assert 0 < found["mfu"] < 1 and found["estimate"] in found["seconds"]
    assert found["seconds"]["cycles"] > 0 and found["collectives"].keys() == {"all-reduce"}


def test_configs_of_a_run_and_of_a_bundle_in_a_bucket(bucket):
    """A run's config.json is itself planned; a bundle's tells the CLIP."""
    clip, decoder = cli.load_config("configs/clip.py:tiny"), cli.load_config("configs/decoder.py:tiny")
    for name, config in (("clip", clip), ("run", decoder)):
        write_bytes(to_path(bucket) / name / "config.json", json.dumps({"config": config.to_dict()}).encode())
    spec = f"{bucket}/run/config.json"
    assert cli.load_config(spec) == decoder
    changed = cli.parse(["plan", f"--config={spec}", f"--config.clip.bundle={bucket}/clip"], {}).config
    assert programs.find_clip(changed).config == clip
    with pytest.raises(UserError, match=r"no config file gs://.*/nowhere.json"):
        cli.load_config(f"{bucket}/nowhere.json")
    write_bytes(to_path(bucket) / "no.json", b"[]")
    with pytest.raises(UserError, match=r"gs://.*/no.json holds no config"):
        cli.load_config(f"{bucket}/no.json")
