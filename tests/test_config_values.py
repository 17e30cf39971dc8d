"""Every key of every config has a range or a set, outside of which it is refused by name."""

import json
import math

import pytest
from shrink import CONFIGS, leaves, small_config

from unclip_jax import cli, config_checks
from unclip_jax.config_checks import check_config
from unclip_jax.config_values import RULES, check_values, get
from unclip_jax.errors import UserError

NAN, INF = math.nan, math.inf
WRONG = {
    bool: [None, 2, "yes", (), NAN, 1.0],
    int: [None, "7", (), 2.5, NAN, INF, True, -3, 10**18],
    float: [None, "0.5", (), NAN, INF, -INF, 1e300, True],
    str: [None, 5, (), NAN, True, "a\0b", "a" * 5000],
    tuple: [None, 5, "x", (None,), (NAN,), ((1, 2, 3, 4),), ({},)],
}


def changed(config, key, value):
    """The config with another value of a key, of whatever type, as it may stand in a config.json."""
    description = json.loads(json.dumps(config.to_dict()))
    *sections, name = key.split(".")
    node = description
    for section in sections:
        node = node[section]
    node[name] = value
    return cli.ConfigDict(cli.lists_to_tuples(description))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_has_a_rule_that_all_sizes_keep(name):
    for size in ("paper", "small", "tiny"):
        config = cli.load_config(f"configs/{name}.py:{size}")
        check_values(config)
        for key in leaves(config):
            assert key in RULES or key.rpartition(".")[2] in RULES, key


def test_no_rule_is_of_a_key_that_no_config_has():
    keys = {key for name in CONFIGS for key in leaves(cli.load_config(f"configs/{name}.py:paper"))}
    names = keys | {key.rpartition(".")[2] for key in keys}
    assert set(RULES) - names == {"model.image", "mlp_width"}, "None without pictures; of converted CLIPs alone"


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_types_and_numbers_are_refused_by_name(name):
    config = small_config(name).unlock()
    config.data.source = "folder:pictures"
    for key, value in leaves(config).items():
        for wrong in WRONG[type(value)]:
            if key == "optim.frozen" and wrong == ("x",):
                continue
            with pytest.raises(UserError, match=rf"^{key} is .*: expected |no config has a key {key}"):
                check_config(changed(config, key, wrong), "runs/x")


def test_ranges_end_where_they_say():
    config = small_config("decoder").unlock()
    config.data.source = "folder:pictures"
    for key, low, high in (
        ("train.seed", 0, 2**32 - 1), ("train.keep", 2, 10**6), ("optim.b2", 0.0, 1 - 1e-9), ("sampling.eta", 0.0, 1.0),
        ("diffusion.drop_caption", 0.0, 1.0), ("model.unet.dropout", 0.0, 1 - 1e-9), ("mesh.fsdp", 1, 2**20),
        ("train.watchdog_minutes", 0.0, 1e5), ("model.text.depth", 1, 1000),
    ):  # fmt: skip
        step = 1 if isinstance(low, int) else 1e-6
        for value in (low, high):
            check_values(changed(config, key, value))
        for value in (low - step, high + step):
            with pytest.raises(UserError, match=f"^{key} is "):
                check_values(changed(config, key, value))
    assert get(config, "model.unet.channels") == 8


@pytest.mark.parametrize("name", CONFIGS)
def test_each_key_that_is_missing_is_named(name):
    config = small_config(name).unlock()
    config.data.source = "folder:pictures"
    needed = config_checks._needed(config.stage)
    assert len(needed & leaves(config).keys()) > 0.85 * len(leaves(config)), "all but a few that one model alone has"
    unread = config_checks._UNREAD.get(config.model.get("caption"), ())
    for key in needed - {"stage"}:
        if key.startswith(unread):
            continue
        section, _, last = key.rpartition(".")
        less = changed(config, key, None)
        del get(less, section)[last]
        with pytest.raises(UserError, match=f"the config has no {key}, which every config of stage {config.stage} has"):
            check_config(less, "runs/x")


def test_whole_numbers_are_floats_where_real_ones_are_meant(tmp_path):
    config = small_config("decoder").unlock()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config": changed(config, "diffusion.drop_caption", 1).to_dict()}))
    read = cli.load_config(str(path))
    assert read.diffusion.drop_caption == 1.0 and type(read.diffusion.drop_caption) is float
    assert type(read.train.steps) is int and read.is_locked


def test_unknown_key_names_the_nearest():
    config = changed(small_config("decoder"), "train.stepz", 3)
    with pytest.raises(UserError, match=r"no config has a key train\.stepz: the nearest is train\.steps"):
        check_values(config)


def test_heads_matter_where_there_is_attention_alone():
    config = small_config("upsampler_256").unlock()
    config.data.source = "folder:pictures"
    config.model.unet.update(dict(head_channels=0, heads=(0, 0), attention=(), middle_attention=False))
    check_config(config, "runs/x")
    config.model.unet.middle_attention = True
    with pytest.raises(UserError, match=r"head_channels is 0, and model\.unet\.heads is \(0, 0\): expected"):
        check_config(config, "runs/x")
