"""Sections and sizes of configs, as a user's own file makes them."""

import inspect

import pytest
from ml_collections import ConfigDict

from unclip_jax import cli, config
from unclip_jax.errors import UserError

PAPER = dict(
    dtype="bfloat16",
    model=dict(**config.pictures(image_size=64), channel_mult=(1, 2), unet=dict(channels=3, dropout=0.1)),
    mesh=config.mesh(data=-1, fsdp=1),
)
SMALL = dict(model=dict(unet=dict(channels=2)))
TINY = dict(dtype="float32", model=dict(image_size=8, channel_mult=(1,)))
FUNCTIONS = [f for _, f in inspect.getmembers(config, inspect.isfunction) if "*," in str(inspect.signature(f))]


def test_sizes_change_the_paper():
    paper, small, tiny = (config.sized(size, PAPER, small=SMALL, tiny=TINY) for size in ("paper", "small", "tiny"))
    assert isinstance(paper, ConfigDict) and isinstance(paper.model.unet, ConfigDict)
    assert paper.to_dict() == PAPER
    assert small.to_dict() == PAPER | dict(model=PAPER["model"] | dict(unet=dict(channels=2, dropout=0.1)))
    changed = dict(dtype="float32", model=PAPER["model"] | dict(image_size=8, channel_mult=(1,)))
    assert tiny.to_dict() == PAPER | changed
    small.update(dict(mesh=dict(fsdp=4)))
    assert small.mesh.fsdp == 4 and PAPER["mesh"]["fsdp"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(model=dict(image_sise=8)), "'model.image_sise', which paper does not have; .* 'model.image_size'"),
        (dict(train=dict(steps=8)), "'train.steps', which paper does not have"),
        (dict(dtyp="float32"), "'dtyp', which paper does not have; the nearest is 'dtype'"),
        (dict(model=8), "'model', which paper does not have"),  # a section is no value
        (dict(dtype=dict(bits=8)), "'dtype.bits', which paper does not have; the nearest is 'dtype'"),
    ],
)
def test_a_change_of_an_unknown_key_is_refused(change, words):
    with pytest.raises(ValueError, match=rf"^tiny changes {words}"):
        config.sized("tiny", PAPER, small=SMALL, tiny=change)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"^config size 'huge': expected one of paper, small, tiny$"):
        config.sized("huge", PAPER, small=SMALL, tiny=TINY)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_a_section_takes_its_keys_and_no_others(function):
    """All are named, and none may be left out."""
    names, base = [], function
    while base:  # with those that go on to the function that it extends
        own = inspect.signature(base).parameters.values()
        names += [p.name for p in own if p.kind is p.KEYWORD_ONLY]
        extended = inspect.getsource(base).partition("_extended(locals(), ")[2].partition(")")[0]
        base = getattr(config, extended) if extended else None
    values = {name: i for i, name in enumerate(names)}
    assert function(**values) == values
    with pytest.raises(TypeError, match="positional"):
        function(*values.values())
    for name in names:
        with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{name}'"):
            function(**{key: value for key, value in values.items() if key != name})
    if function is not config.recipe:  # which takes sections
        with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
            function(**values, other=0)


def test_functions_are_found():
    assert len(FUNCTIONS) > 20 and config.unet in FUNCTIONS and config.recipe in FUNCTIONS


OWN = """
from unclip_jax import config

PAPER = dict(stage="mine", data=dict(**config.data(
    source="", weights=(), data_dir="", split="", eval_split="", image_feature="", caption_feature="", min_side=0,
    max_aspect=0.0, crop="center", threads=2, workers=0,
), own=(1, 2)))

def get_config(size="paper"):
    return config.sized(size, PAPER, small=dict(data=dict(threads=4)), tiny=dict(data=dict(thread=1)))
"""


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    loaded = cli.load_config(str(path))
    assert (loaded.stage, loaded.data.threads, loaded.data.own) == ("mine", 2, (1, 2)) and loaded.is_locked
    assert cli.load_config(f"{path}:small").data.threads == 4
    with pytest.raises(UserError, match=r"mine\.py:tiny: tiny changes 'data\.thread', .* nearest is 'data\.threads'$"):
        cli.load_config(f"{path}:tiny")
    with pytest.raises(UserError, match=r"mine\.py:huge: config size 'huge': expected one of paper, small, tiny$"):
        cli.load_config(f"{path}:huge")
