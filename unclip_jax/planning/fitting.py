"""Looks for settings under which a training fits into the memory of its chips."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

TRIALS = 6  # compilations at most
KEPT = 0.35  # about so much of what a network keeps for its gradients stays with remat
SPLIT = ("parameters", "moving average", "optimizer")


class Setting(NamedTuple):
    """Setting of what may be changed; of two settings the smaller costs less time."""

    remat: bool  # on where the config has it off
    accumulate: int
    fsdp: int

    def changed(self, config: ConfigDict) -> dict[str, bool | int]:
        """The keys to change, with their new values."""
        keys = {name: True for name, _ in remat_keys("model", config.model) if self.remat}
        keys |= {"optim.accumulate": self.accumulate} if self.accumulate != config.optim.accumulate else {}
        return keys | ({"mesh.fsdp": self.fsdp, "mesh.data": -1} if self.fsdp != config.mesh.fsdp else {})

    def of(self, config: ConfigDict) -> ConfigDict:
        """The config with them changed."""
        new = config.copy_and_resolve_references().unlock()
        new.update_from_flattened_dict(self.changed(config))
        return new.lock()


def remat_keys(name: str, section: ConfigDict) -> Iterator[tuple[str, bool]]:
    """Every key `remat` of a section named `name`, with its value."""
    for key, value in section.items():
        if isinstance(value, ConfigDict):
            yield from remat_keys(f"{name}.{key}", value)
        elif key == "remat":
            yield f"{name}.{key}", value


def settings(config: ConfigDict, chips: int) -> list[Setting]:
    """Lists the settings that batch and chips allow, the config's own first, and none that takes more memory."""
    batch, least = config.train.batch_size, config.optim.accumulate
    most = least if config.stage == "clip" else batch // chips  # CLIP's loss wants the whole batch at once
    accumulate = [n for n in range(least, most + 1) if n % least == 0 and batch % (chips * n) == 0]
    fsdp = [n for n in range(config.mesh.fsdp, chips + 1) if chips % n == 0]
    remat = {False, any(not value for _, value in remat_keys("model", config.model))}
    return sorted(Setting(r, a, f) for r in remat for a in accumulate for f in fsdp)


def search(
    possible: list[Setting], parts: dict[str, int], needed: int, limit: int, attempt: Callable[[Setting], int]
) -> Setting | None:
    """The least costly setting that fits, or None where none was found in TRIALS attempts.

    possible: as of `settings`. parts: bytes that lie on each chip all the time, as of memory.lasting, and needed: bytes
    in all, both under the first setting. attempt: compiles with a setting → bytes needed. Which ones to compile is
    guessed from what is known so far; one whose parameters and gradients alone are too large is never compiled.
    """
    base, *left = possible
    state, rest = sum(parts[name] for name in SPLIT), sum(parts.values())

    def lasting(setting):
        whole = state + parts["parameters"]  # gradients lie as parameters do
        return rest - state + whole * base.fsdp / setting.fsdp

    def share(setting):
        return base.accumulate / setting.accumulate * (KEPT if setting.remat else 1)

    activations = needed - lasting(base)
    for _ in range(TRIALS):
        left = [setting for setting in left if lasting(setting) < limit]
        if not left:
            return None
        expected = {setting: lasting(setting) + share(setting) * activations for setting in left}
        hopeful = [setting for setting in left if expected[setting] <= limit]
        trial = hopeful[0] if hopeful else min(left, key=lambda setting: expected[setting])
        needed = attempt(trial)
        if needed <= limit:
            return trial
        activations = max(activations, (needed - lasting(trial)) / share(trial))
        left = [s for s in left if any(a > b for a, b in zip(s, trial, strict=True))]
    return None
