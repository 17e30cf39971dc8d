"""Prints what a bug report needs, and what to install where something does not fit.

    python -m unclip_jax.doctor [--json]

It shows versions, devices, the NVIDIA driver, environment variables that the user set, the cache of compiled programs,
disk, memory and optional packages. It changes nothing, takes seconds, and works however broken the installation is.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unclip_jax import __version__, cli
from unclip_jax.paths import is_remote, to_path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
PLUGINS = {"tpu": "libtpu", "cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin"}  # jax's extra → package
VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")
TEST_EXTRAS = ("test", "parity", "notebooks")  # which no command needs
SECONDS_FOR_DEVICES = 60  # a TPU that another process holds may never answer
LIST_DEVICES = """
import collections, jax, json
kinds = collections.Counter(f"{device.platform} ({device.device_kind})" for device in jax.devices())
print(json.dumps([f"{count} {kind}" for kind, count in kinds.items()]))
"""


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line. Raises UserError for what is wrong with it."""
    parser = cli.Parser("doctor", __doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv[1:])


def main(argv: list[str]) -> int:
    args = parse(argv)
    found = examine()
    print(json.dumps(found, indent=2) if args.json else _table(found))
    return 0


def examine() -> dict[str, Any]:
    """Collects everything that is printed, by name; "advice" is a list with a line for each thing that does not fit."""
    set_by_user = {name: value for name, value in sorted(os.environ.items()) if name not in cli.SET_BY_US}
    found = {
        "python": _try(lambda: f"{platform.python_version()} ({sys.executable})"),
        "system": _try(lambda: f"{platform.platform()}, {os.cpu_count()} CPUs"),
        "unclip_jax": _try(_own_version),
        "packages": {name: _version(name) for name in (*PACKAGES, *PLUGINS.values())},
        "devices": _try(_devices),
        "nvidia": _try(_nvidia),
        "environment": {name: value for name, value in set_by_user.items() if name.startswith(VARIABLES)},
        "compilation cache": _try(_cache),
        "working folder": _try(lambda: f"{Path.cwd()}, {_free(Path.cwd())}"),
        "memory": _try(_memory),
        "missing": _try(_missing),
    }
    return found | {"advice": _try(lambda: _advice(found))}


def _try(look: Callable[[], Any]) -> Any:
    """Returns what `look` finds, or "unknown: " and its error, so that one broken thing does not hide the others."""
    try:
        return look()
    except Exception as error:
        return f"unknown: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _version(name: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _own_version() -> str:
    """Returns this package's version and place, and in a git checkout the commit and whether files were changed."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return f"{__version__} ({root})"
    git = ["git", "-C", str(root)]
    commit = _output([*git, "rev-parse", "--short", "HEAD"]).strip()
    changed = ", changed" if _output([*git, "status", "--porcelain", "--untracked-files=no"]) else ""
    return f"{__version__} ({root}, commit {commit}{changed})"


def _output(command: list[str]) -> str:
    """Runs a command and returns what it prints on stdout. Raises OSError where it fails."""
    run = subprocess.run(command, capture_output=True, text=True, timeout=10, errors="replace")
    if run.returncode:  # nvidia-smi says on stdout what is wrong
        raise OSError(f"{command[0]} fails: {run.stderr.strip() or run.stdout.strip()}")
    return run.stdout


def _devices() -> list[str] | str:
    """Lists the devices that JAX finds and its last warning, or returns one line on why it finds none.

    It looks in another process, because a broken driver may abort the process.
    """
    try:
        command = [sys.executable, "-c", LIST_DEVICES]
        run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_DEVICES, errors="replace")
    except subprocess.TimeoutExpired:
        return f"JAX found no device in {SECONDS_FOR_DEVICES} s: does another process use it?"
    words = next((line.strip()[:500] for line in reversed(run.stderr.splitlines()) if line.strip()), "")
    if run.returncode:
        return f"JAX does not start: {words or f'exit status {run.returncode}'}"
    return json.loads(run.stdout.splitlines()[-1]) + ([f"JAX says: {words}"] if words else [])


def _nvidia() -> dict[str, str] | None:
    """Returns "driver", "cuda" (the newest CUDA that the driver runs) and "gpus"; None if no driver is installed."""
    if not shutil.which("nvidia-smi"):
        return None
    words = _output(["nvidia-smi"])
    driver, cuda = (re.search(rf"{what} Version:\s*([\d.]+)", words) for what in ("(?:Driver|KMD)", "CUDA(?: UMD)?"))
    gpus = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]).strip().splitlines()
    version = {"driver": driver and driver[1], "cuda": cuda and cuda[1]}
    return {name: value for name, value in version.items() if value} | {"gpus": "; ".join(gpus)}


def _cache() -> str:
    """Describes the folder of compiled programs: files, size, free space, and whether it can be written."""
    name = os.environ.get("JAX_COMPILATION_CACHE_DIR") or cli.CACHE
    if is_remote(name):
        return name
    folder = to_path(name)
    files = [entry for entry in os.scandir(folder) if entry.is_file()] if folder.is_dir() else []
    size = sum(entry.stat().st_size for entry in files) / 2**20
    writable = "writable" if os.access(_existing(folder), os.W_OK) else "not writable"
    return f"{folder}: {len(files)} files, {size:.1f} MiB, {writable}, {_free(folder)}"


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(_existing(folder)).free / 2**30:.1f} GiB free"


def _existing(folder: Path) -> Path:
    """Returns the folder itself, or the nearest folder above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _memory() -> str:
    """Describes this machine's memory."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = re.search(r"MemAvailable:\s*(\d+) kB", to_path("/proc/meminfo").read_text())
    return f"{total / 2**30:.1f} GiB, {int(available[1]) / 2**20:.1f} GiB available"


def _missing() -> dict[str, list[str]]:
    """Lists, for each extra of this package, those of its packages that are not installed."""
    missing: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("unclip_jax") or []:
        name, of_jax, extra = _parsed(requirement)
        name = PLUGINS.get(of_jax, name)
        if extra and extra not in TEST_EXTRAS and not _version(name):
            missing.setdefault(extra, []).append(name)
    return missing


def _parsed(requirement: str) -> tuple[str, str, str]:
    """Splits a requirement, such as 'jax[cuda13]>=1; extra == "cuda"'.

    Returns the package's name ("jax"), the extra of that package ("cuda13") and this package's extra that requires it
    ("cuda"), each "" where there is none.
    """
    words, _, marker = requirement.partition(";")
    name, of_other = re.match(r"\s*([\w.-]+)\s*(?:\[([\w,-]+)\])?", words).groups("")
    extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", marker)
    return name, of_other, extra[1] if extra else ""


def _advice(found: dict[str, Any]) -> list[str]:
    """Writes a line for each thing in `examine`'s findings that does not fit."""
    packages, nvidia, devices = found["packages"], found["nvidia"], found["devices"]
    lines = [f"{name} is not installed: pip install {name}" for name in PACKAGES if not packages[name]]
    plugins = [name for name in (PLUGINS["cuda12"], PLUGINS["cuda13"]) if packages[name]]
    if isinstance(nvidia, str):
        lines.append(f"NVIDIA's driver does not answer: {nvidia}")
    elif nvidia:
        lines += _for_gpu(nvidia, plugins)
    elif plugins:
        lines.append(f"{plugins[0]} is installed, but nvidia-smi is not: install NVIDIA's driver, or train on the CPU")
    if len(plugins) == 2:
        lines.append("two CUDA plugins are installed: pip uninstall the one that the driver cannot run")
    for plugin in plugins:
        version, wanted = packages[plugin], packages["jaxlib"]
        if wanted and version != wanted:
            lines.append(f"{plugin} {version} does not belong to jaxlib {wanted}: {_install(plugin)}")
    if isinstance(devices, str):
        lines.append(devices)
    elif nvidia and plugins and not lines and "cpu" in devices[0]:
        lines.append(
            f"{plugins[0]} is installed and fits the driver, but JAX uses the CPU: look at JAX_PLATFORMS under "
            "environment, and at what JAX says under devices"
        )
    if "not writable" in found["compilation cache"]:
        lines.append("compiled programs cannot be kept: set JAX_COMPILATION_CACHE_DIR to a folder that can be written")
    return lines


def _for_gpu(nvidia: dict[str, str], plugins: list[str]) -> list[str]:
    """Advises which plugin to install for a driver. A plugin runs on drivers for its own CUDA version and newer ones.

    nvidia: as of `_nvidia`. plugins: CUDA plugins that are installed.
    """
    cuda = nvidia.get("cuda", "")
    major = int(cuda.partition(".")[0] or 0)
    if not major:
        return []
    fits = PLUGINS["cuda13"] if major >= 13 else PLUGINS["cuda12"]
    if major < 12:
        return [f"the driver {nvidia.get('driver')} runs CUDA {cuda}, JAX needs 12 or 13: install a newer driver"]
    if not plugins:
        return [f"JAX cannot use the GPU: {_install(fits)}"]
    if plugins == [PLUGINS["cuda13"]] and major == 12:
        return [
            f"the driver {nvidia.get('driver')} runs CUDA {cuda}, {plugins[0]} needs 13: "
            f"pip uninstall {plugins[0]} jax-cuda13-pjrt, then {_install(fits)}, or install a newer driver"
        ]
    return []


def _install(plugin: str) -> str:
    """Returns the command that installs a CUDA plugin."""
    return f"pip install 'unclip_jax[{'cuda12' if plugin == PLUGINS['cuda12'] else 'cuda'}]'"


def _table(found: dict[str, Any]) -> str:
    """Formats `examine`'s findings, one a line, with the advice at the end."""
    lines = []
    for name, value in found.items():
        if name in ("advice", "missing"):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items() if item) or "none"
        elif isinstance(value, list):
            value = ", ".join(value)
        lines.append(f"{name:18} {value or 'none'}")
    missing, advice = found["missing"], found["advice"]
    if isinstance(missing, str):
        lines.append(f"{'optional packages':18} {missing}")
    else:
        for extra, names in missing.items():
            lines.append(f"{'not installed':18} {', '.join(names)}: pip install 'unclip_jax[{extra}]'")
    advice = advice if isinstance(advice, list) else [advice]
    return "\n".join([*lines, "", *(f"advice: {line}" for line in advice or ["none, everything fits"])])


if __name__ == "__main__":
    cli.run(main)
