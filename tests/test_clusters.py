"""Files for clusters in tpu_scripts/: the image, the manifest for Kubernetes, and the SLURM job; srun is played."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from unclip_jax import train
from unclip_jax.config import PLACES, flat_items
from unclip_jax.config_checks import check_config
from unclip_jax.planning.chips import parse_slices, parse_topology

ROOT = Path(__file__).parent.parent
DOCKERFILE, GKE, SLURM = (ROOT / "tpu_scripts" / name for name in ("Dockerfile", "gke.yaml", "slurm.sbatch"))


def linter(name):
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name) or pytest.skip(f"needs {name}")


@pytest.mark.parametrize(("name", "path"), [("hadolint", DOCKERFILE), ("shellcheck", SLURM)])
def test_linter_finds_nothing(name, path):
    done = subprocess.run([linter(name), str(path)], capture_output=True, text=True)
    assert done.stdout + done.stderr == "" and done.returncode == 0


# The image.


@pytest.fixture(scope="module")
def instructions():
    """Instructions of the Dockerfile, each a list of words; continued lines are one."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line]


def test_image_has_all_that_the_wheel_is_made_of(instructions):
    """test_install.py makes a wheel of these and runs it."""
    copied = [word for name, *words in instructions if name == "COPY" for word in words[:-1]]
    assert sorted(copied) == ["README.md", "configs", "experiments", "setup.py", "unclip_jax"]
    mounted = [word for words in instructions for word in words if word.startswith("--mount=") and "from=" not in word]
    sources = re.findall(r"source=([^,]+)", " ".join(mounted))
    assert sources and all((ROOT / name).exists() for name in [*copied, *sources])


def test_image_installs_an_extra_that_exists_and_keeps_no_cache(instructions):
    (extra,) = (words[1].removeprefix("EXTRA=") for words in instructions if words[1].startswith("EXTRA="))
    installs = [" ".join(words) for words in instructions if "pip" in words]
    assert len(installs) == 2 and all("--no-cache-dir" in line for line in installs)
    assert "[data,${EXTRA}]" in installs[1]
    text = (ROOT / "setup.py").read_text()
    assert all(f'"{name}": ' in text for name in (extra, "data", *re.findall(r"EXTRA=(\w+)", DOCKERFILE.read_text())))


def test_image_runs_the_command_and_not_as_root(instructions):
    last = {words[0]: words[1:] for words in instructions}
    assert last["ENTRYPOINT"] == ['["unclip"]'] and f"--uid={last['USER'][0]}" in " ".join(last["RUN"])
    assert int(last["USER"][0]) > 0


# The manifest.


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load(GKE.read_text())


@pytest.fixture(scope="module")
def job(jobset):
    (one,) = jobset["spec"]["replicatedJobs"]
    return one["template"]["spec"]


@pytest.fixture(scope="module")
def container(job):
    (one,) = job["template"]["spec"]["containers"]
    return one


def test_manifest_is_a_jobset_of_jobs_that_kubernetes_knows(jobset):
    """The job within is validated by Kubernetes' own schema, which knows no other keys."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    assert set(jobset["spec"]) == {"failurePolicy", "replicatedJobs"}
    (one,) = jobset["spec"]["replicatedJobs"]
    assert set(one) == {"name", "replicas", "template"} and one["replicas"] >= 1
    made = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "unclip-slice-0"}, **one["template"]}
    kubernetes_validate.validate(made, "1.31", strict=True)


def test_each_chip_of_the_slice_is_asked_for_once(jobset, job, container):
    selector = job["template"]["spec"]["nodeSelector"]
    kind = selector["cloud.google.com/gke-tpu-accelerator"].removeprefix("tpu-").removesuffix("-slice")
    topology = f"{kind}:{selector['cloud.google.com/gke-tpu-topology']}"
    _, chips = parse_topology(topology)
    assert chips == math.prod(map(int, parse_slices(topology)[2].split("x")))
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert chips == job["parallelism"] * resources["limits"]["google.com/tpu"]
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed"
    exclusive = jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"
    assert chips % train.parse(container["args"]).config.mesh.fsdp == 0


def test_command_trains_in_a_bucket(container):
    assert "command" not in container, "the image's own"
    flags = train.parse(container["args"])
    check_config(flags.config, flags.workdir)
    assert container["args"][0] == "train" and flags.platform == "tpu"
    set_places = [value for key, value in flat_items(flags.config.to_dict()) if key in PLACES and value]
    outside = [value for value in set_places if not str(value).startswith(("gs://", "tfds:"))]
    assert flags.workdir.startswith("gs://") and len(set_places) > 2 and not outside
    assert {each["name"]: each["value"][:5] for each in container["env"]} == {"JAX_COMPILATION_CACHE_DIR": "gs://"}


def test_what_stopped_starts_again_and_a_mistake_does_not(jobset, job):
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0 and policy["restartStrategy"] == "BlockingRecreate"
    (rule,) = policy["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (mistake,) = job["podFailurePolicy"]["rules"]
    assert mistake == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    pod = job["template"]["spec"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 600


def test_pod_runs_as_the_user_of_the_image(job, instructions):
    user = next(words[1] for words in instructions if words[0] == "USER")
    assert job["template"]["spec"]["securityContext"] == {"runAsNonRoot": True, "runAsUser": int(user)}


# The SLURM job.

PLAYED = """#!/usr/bin/env bash
# Notes its words; srun ends as it is told to.
printf '%s\\0' "${0##*/}" "$@" >>"$NOTES"
printf '\\1' >>"$NOTES"
[[ ${0##*/} != srun ]] || exit "$STATUS"
"""
IN_A_JOB = dict(SLURM_JOB_ID="17", SLURM_NTASKS_PER_NODE="8", SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="12")
AWKWARD = ["--workdir=/shared/my runs/a", '--config.data.source=folder:it\'s $HOME; "x" &', "a\nb"]


@pytest.fixture
def submit(tmp_path):
    """Runs the job; returns what happened and the commands that it ran, each a list of words."""
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(PLAYED)
        (tmp_path / name).chmod(0o755)
    notes = tmp_path / "notes"

    def run(*arguments, status=0, **variables):
        notes.write_text("")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        played = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NOTES": str(notes), "STATUS": str(status)}
        command = ["bash", str(SLURM), *arguments]  # SLURM copies the script, so nothing beside it is found
        done = subprocess.run(command, env=kept | played | variables, capture_output=True, text=True, timeout=60)
        return done, [part.split("\0")[:-1] for part in notes.read_text().split("\1")[:-1]]

    return run


def test_job_trains_by_a_task_for_each_gpu(submit):
    done, commands = submit(*AWKWARD, **IN_A_JOB)
    (srun,) = commands
    python = srun.index("python")
    assert srun[:python] == ["srun", "--gpu-bind=none", "--kill-on-bad-exit=0", "--cpus-per-task=12"]
    assert srun[python:] == ["python", "-m", "unclip_jax.train", "--platform=gpu", *AWKWARD]
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.parametrize(("status", "again"), [(0, False), (143, True), (1, False), (2, False), (130, False)])
def test_job_is_queued_again_only_where_it_was_stopped(submit, status, again):
    done, commands = submit("--workdir=a", status=status, **IN_A_JOB)
    assert commands[1:] == ([["scontrol", "requeue", "17"]] if again else []) and done.returncode == status
    assert status != 143 or status == train.exit_status(train.signal.SIGTERM)


@pytest.mark.parametrize(("changed", "said"), [
    (dict(SLURM_JOB_ID=""), "this is a job of SLURM: sbatch "),
    (dict(SLURM_NTASKS_PER_NODE="1"), "1 tasks for 8 GPUs on a node: give --ntasks-per-node the number of "),
    (dict(SLURM_GPUS_ON_NODE=""), "8 tasks for no GPUs on a node: "),
])  # fmt: skip
def test_jobs_that_cannot_work_are_refused(submit, changed, said):
    done, commands = submit("--workdir=a", **IN_A_JOB | changed)
    assert done.returncode == 2 and commands == [] and done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1


def test_job_without_arguments_is_refused(submit):
    done, commands = submit(**IN_A_JOB)
    assert done.returncode == 2 and commands == [] and done.stderr.startswith("error: give the arguments of ")


def test_options_of_the_job_fit_each_other():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", SLURM.read_text(), re.MULTILINE))
    assert SLURM.read_text().startswith("#!/usr/bin/env bash\n") and os.access(SLURM, os.X_OK)
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert re.fullmatch(r"TERM@\d+", options["signal"]), "to the tasks: with B: to this script alone"
    assert options["requeue"] == "" and options["open-mode"] == "append"
