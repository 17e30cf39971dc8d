"""Searches for settings with which a training step fits into the memory of its chips."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

MAX_TRIALS = 6  # compilations
KEPT_WITH_REMAT = 0.35  # share of the activations kept for gradients that remat keeps, roughly
SHARDED = ("parameters", "moving average", "optimizer")  # parts of the memory that mesh.fsdp splits


class Setting(NamedTuple):
    """Values of the config keys that the search may change; a smaller setting costs less time."""

    remat: bool  # turn remat on wherever the config has it off
    accumulate: int
    fsdp: int

    def overrides(self, config: ConfigDict) -> dict[str, bool | int]:
        """Returns the keys whose values differ from the config's, such as "optim.accumulate", with the new values."""
        keys = {name: True for name, _ in remat_keys("model", config.model) if self.remat}
        keys |= {"optim.accumulate": self.accumulate} if self.accumulate != config.optim.accumulate else {}
        return keys | ({"mesh.fsdp": self.fsdp, "mesh.data": -1} if self.fsdp != config.mesh.fsdp else {})

    def applied_to(self, config: ConfigDict) -> ConfigDict:
        """Returns a locked copy of the config with this setting."""
        new = config.copy_and_resolve_references().unlock()
        new.update_from_flattened_dict(self.overrides(config))
        return new.lock()


def remat_keys(name: str, section: ConfigDict) -> Iterator[tuple[str, bool]]:
    """Yields the dotted name and the value of every key `remat` in the config section `name`."""
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            yield from remat_keys(f"{name}.{key}", value)
        elif key == "remat":
            yield f"{name}.{key}", value


def possible_settings(config: ConfigDict, chips: int) -> list[Setting]:
    """Lists the settings that the batch size and the number of chips allow, cheapest first.

    The first one is the config's own. No other lowers its remat, accumulate or fsdp, which would take more memory.
    """
    batch, least = config.train.batch_size, config.optim.accumulate
    together = chips
    if config.optim.get("sam_rho"):
        together = math.lcm(chips, config.optim.sam_rows)
    accumulate = [n for n in range(least, batch // chips + 1) if n % least == 0 and batch % (together * n) == 0]
    fsdp = [n for n in range(config.mesh.fsdp, chips + 1) if chips % n == 0]
    remat = {False, any(not value for _, value in remat_keys("model", config.model))}
    return sorted(Setting(r, a, f) for r in remat for a in accumulate for f in fsdp)


def find_setting(
    possible: list[Setting], parts: dict[str, int], needed: int, limit: int, attempt: Callable[[Setting], int]
) -> Setting | None:
    """Finds the cheapest setting that fits, or returns None if none was found in MAX_TRIALS attempts.

    possible: as of `possible_settings`.
    parts: bytes that stay on each chip between calls, as of `memory.resident_bytes`, with the first setting.
    needed: bytes that each chip needs in all, with the first setting.
    limit: bytes that each chip has.
    attempt: compiles with a setting and returns the bytes that each chip needs.

    Which setting to attempt next is guessed from the attempts so far. A setting whose parameters and gradients alone
    are too large is never attempted.
    """
    base, *left = possible
    state, resident = sum(parts[name] for name in SHARDED), sum(parts.values())

    def least(setting: Setting) -> float:
        """Bytes that a setting needs at the very least: all that stays on the chip, and gradients."""
        sharded = state + parts["moving average"]  # gradients are as large as what is averaged
        return resident - state + sharded * base.fsdp / setting.fsdp

    def share(setting: Setting) -> float:
        """Activations of a setting as a share of the first one's."""
        return base.accumulate / setting.accumulate * (KEPT_WITH_REMAT if setting.remat else 1)

    activations = needed - least(base)
    for _ in range(MAX_TRIALS):
        left = [setting for setting in left if least(setting) < limit]
        if not left:
            return None

        # The cheapest setting that is expected to fit; if there is none, the one that is expected to need least.
        expected = {setting: least(setting) + share(setting) * activations for setting in left}
        hopeful = [setting for setting in left if expected[setting] <= limit]
        trial = hopeful[0] if hopeful else min(left, key=lambda setting: expected[setting])
        needed = attempt(trial)
        if needed <= limit:
            return trial

        # Activations were larger than expected; settings that save nothing over this one will not fit either.
        activations = max(activations, (needed - least(trial)) / share(trial))
        left = [s for s in left if any(a > b for a, b in zip(s, trial, strict=True))]
    return None
