"""Programs kept on the disk: found without tracing, and only by who would have made the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from shrink import save_cascade, tokenizer_bytes

from unclip_jax import cli, programs
from unclip_jax.bundle import load_bundle, save_bundle
from unclip_jax.errors import UserError
from unclip_jax.model import Model
from unclip_jax.models.mesh import one_device
from unclip_jax.stages.clip import Clip

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """An empty folder in which programs are kept."""
    monkeypatch.setattr(programs, "environment", programs.known)
    monkeypatch.setattr(programs, "folder", tmp_path / "programs")
    programs.known.cache_clear()
    yield tmp_path / "programs"
    programs.known.cache_clear()


class Traced:
    """A program as another process would look for it, and how often it was traced."""

    def __init__(self, *about):
        self.times = 0
        self._kept = programs.Kept(lambda: jax.jit(self._function), one_device(), *about)

    def _function(self, given, scale):
        self.times += 1
        return jnp.tanh(given["x"] * scale) + jnp.sum(given["x"])

    def __call__(self, x=X, scale=2.0):
        found = self._kept({"x": jax.device_put(x)}, jnp.float32(scale))
        np.testing.assert_allclose(found, np.tanh(x * np.float32(scale)) + np.sum(x), rtol=1e-5)
        return self.times


def test_a_second_process_neither_traces_nor_compiles(kept):
    count = cli.CompileCount()
    assert [Traced("a")(), Traced("a")(), Traced("a")(scale=3.0)] == [1, 0, 0]
    assert len(list(kept.iterdir())) == 1 and str(count) == "1 programs compiled, 2 from the cache"


def test_what_makes_another_program_is_not_found(kept, monkeypatch):
    assert [Traced("a")(), Traced("b")(), Traced("a")(X[:1])] == [1, 1, 1]
    with jax.default_matmul_precision("bfloat16"):
        assert Traced("a")() == 1
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert Traced("a")() == 1


@pytest.mark.parametrize("what", ["code", "version", "processor"])
def test_other_code_versions_and_processors_have_programs_of_their_own(kept, tmp_path, monkeypatch, what):
    device = jax.local_devices()[0]
    before = programs.known(device)
    programs.known.cache_clear()
    assert programs.known(device) == before
    programs.known.cache_clear()
    if what == "code":
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "programs.py").write_text("x = 1")
        monkeypatch.setattr(programs, "__file__", str(tmp_path / "package" / "programs.py"))
        one = programs.known(device)
        programs.known.cache_clear()
        (tmp_path / "package" / "programs.py").write_text("x = 2")
        assert len({before, one, programs.known(device)}) == 3
    elif what == "version":
        monkeypatch.setattr(programs, "version", lambda name: "1.2.3")
        assert programs.known(device) != before
    else:
        (tmp_path / "cpuinfo").write_text("model name : another\nflags : sse\n")
        monkeypatch.setattr(programs, "CPU", str(tmp_path / "cpuinfo"))
        assert programs.known(device) not in (before, "")


def test_nothing_is_kept_where_the_processor_is_not_known(kept, monkeypatch):
    monkeypatch.setattr(programs, "CPU", "/nowhere")
    assert [Traced("a")(), Traced("a")()] == [1, 1] and not kept.exists()


def test_a_damaged_program_is_compiled_anew(kept):
    assert Traced("a")() == 1
    (path,) = kept.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:-100], whole[:500] + bytes(100) + whole[600:]):
        path.write_bytes(damaged)
        assert [Traced("a")(), Traced("a")()] == [1, 0]


def test_a_program_in_jax_s_own_cache_is_kept_whole(kept, tmp_path, monkeypatch):
    """What comes from there cannot be stored again on a CPU: it would load, and then lack its functions."""
    options = {"jax_compilation_cache_dir": str(tmp_path / "jax"), "jax_persistent_cache_min_compile_time_secs": 0.0}
    options |= {"jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        reset_cache()
        monkeypatch.setattr(programs, "folder", None)
        assert Traced("a")() == 1 and list((tmp_path / "jax").iterdir())
        monkeypatch.setattr(programs, "folder", kept)
        jax.clear_caches()
        assert [Traced("a")(), Traced("a")()] == [1, 0]
        assert jax.config.jax_enable_compilation_cache
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


def test_programs_that_others_may_write_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "folder", None)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    try:
        cli.enable_compilation_cache()
        assert programs.folder == tmp_path / "cache" / "programs"
        programs.folder.chmod(0o777)
        with pytest.raises(UserError, match=r"others may write to the compilation cache .*programs"):
            cli.enable_compilation_cache()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        reset_cache()


def test_models_of_one_config_share_programs_but_not_weights(kept, tmp_path, monkeypatch):
    save_cascade(tmp_path / "cascade")
    one = load_bundle(tmp_path / "cascade" / "clip")
    changed = jax.tree.map(lambda leaf: leaf * np.float32(1.5), one.params)
    save_bundle(tmp_path / "other", "clip", one.config, changed, tokenizer_bytes(), "", {})
    texts = ["a red fox", "a blue tent"]
    drawn = Model.load(tmp_path / "cascade" / "clip", ("clip",)).embed_texts(texts)
    with monkeypatch.context() as patch:
        patch.setattr(programs, "folder", None)
        expected = Model.load(tmp_path / "other", ("clip",)).embed_texts(texts)
    monkeypatch.setattr(Clip, "embed_texts", None)  # nothing can be traced from here on
    monkeypatch.setattr(Clip, "init", None)
    np.testing.assert_array_equal(Model.load(tmp_path / "cascade" / "clip", ("clip",)).embed_texts(texts), drawn)
    found = Model.load(tmp_path / "other", ("clip",)).embed_texts(texts)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(expected - drawn).max() > 1e-3

    misshapen = changed | {"logit_scale": np.zeros(3, np.float32)}
    save_bundle(tmp_path / "misshapen", "clip", one.config, misshapen, tokenizer_bytes(), "", {})
    with pytest.raises(UserError, match=r"logit_scale is \(3,\), expected \(\)"):
        Model.load(tmp_path / "misshapen", ("clip",))
