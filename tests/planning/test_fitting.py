"""The search for settings that fit, with compilations that are made up."""

import pytest

from unclip_jax import cli
from unclip_jax.planning.fitting import Setting, find_setting, possible_settings

GIB = 2**30
PARTS = {"parameters": 10 * GIB, "moving average": 10 * GIB, "optimizer": 20 * GIB, "frozen CLIP": 2 * GIB, "batch": 0}


def config(remat=True, **changes):
    found = cli.load_config("configs/decoder.py:paper").unlock()
    found.model.unet.remat = remat
    found.train.batch_size = 128
    found.update_from_flattened_dict(changes)
    return found.lock()


def needed(setting, activations):
    """GiB: state, gradients and what batch and remat leave of the activations; a whole copy where it is split."""
    copy, kept = 10 * (setting.fsdp > 1), 0.4 if setting.remat else 1
    return round(GIB * (2 + 50 / setting.fsdp + copy + kept * activations / setting.accumulate))


def run(config, activations, limit):
    tried = []

    def attempt(setting):
        tried.append(setting)
        return needed(setting, activations)

    base = Setting(False, config.optim.accumulate, config.mesh.fsdp)
    return find_setting(possible_settings(config, 16), PARTS, needed(base, activations), limit * GIB, attempt), tried


@pytest.mark.parametrize(
    ("remat", "activations", "limit", "expected"),
    [
        (True, 20, 60, (False, 1, 2)),  # a little too much: two chips share the state
        (True, 20, 40, (False, 1, 8)),  # 2 + 6.25 + 10 + 20
        (True, 100, 95, (False, 2, 2)),  # activations alone are too much: two microbatches
        (True, 100, 30, (False, 8, 16)),
        (False, 100, 95, (False, 2, 2)),  # keeping activations is worth two microbatches
        (False, 100, 21, (True, 8, 16)),  # at most 8 microbatches of 16 rows
        (True, 100, 14, None),  # 2 + 3.1 + 10 already
        (True, 100, 2, None),
    ],
)
def test_the_least_costly_that_fits_is_found(remat, activations, limit, expected):
    found, tried = run(config(remat), activations, limit)
    assert found == expected
    assert len(tried) <= 6
    if limit == 2:
        assert not tried  # its shapes tell that nothing fits


def test_settings_are_those_that_batch_and_chips_allow():
    found = possible_settings(config(), 16)
    assert found[0] == (False, 1, 1)
    assert {s.accumulate for s in found} == {1, 2, 4, 8} and {s.fsdp for s in found} == {1, 2, 4, 8, 16}
    assert not any(s.remat for s in found) and any(s.remat for s in possible_settings(config(False), 16))
    own = possible_settings(config(**{"optim.accumulate": 2, "mesh.fsdp": 4}), 16)
    assert own[0] == (False, 2, 4) and {s.fsdp for s in own} == {4, 8, 16} and {s.accumulate for s in own} == {2, 4, 8}
    clip = cli.load_config("configs/clip.py:paper")  # whose rows climb in groups of 64, for SAM
    assert max(s.accumulate for s in possible_settings(clip, 8)) == 32768 // 64


def test_a_setting_is_keys_and_a_config():
    before = config(False)
    setting = Setting(True, 4, 8)
    assert setting.overrides(before) == {
        "model.unet.remat": True, "optim.accumulate": 4, "mesh.fsdp": 8, "mesh.data": -1,
    }  # fmt: skip
    after = setting.applied_to(before)
    assert (after.model.unet.remat, after.optim.accumulate, after.mesh.fsdp, after.mesh.data) == (True, 4, 8, -1)
    assert Setting(False, 1, 1).overrides(before) == {} and not before.model.unet.remat
