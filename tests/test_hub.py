"""Models on the Hugging Face Hub: pushed to and fetched from a server of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fake_hub
import jax
import pytest
from shrink import compilation_cache, save_cascade

from unclip_jax import cli, hub, push
from unclip_jax.bundle import load_bundle
from unclip_jax.errors import UserError
from unclip_jax.paths import output_folder, to_path

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    with compilation_cache():
        yield save_cascade(tmp_path_factory.mktemp("cascade"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    with fake_hub.serve() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        hub.pull.cache_clear()
        server.environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "token"}
        server.environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_DISABLE_TELEMETRY": "1"}
        yield server
        hub.pull.cache_clear()


def run(server, *words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "unclip_jax", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | server.environment | environment,
    )  # fmt: skip


def uploaded(server, folder, name="me/tiny", **more):
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return server.hub.commit(name, files | more)


@pytest.mark.slow
def test_a_cascade_makes_a_round_trip(cascade, server, tmp_path):
    """Pushed, with a card; drawn from by its name, the same pictures; once more without the Hub."""
    numbers = {"name": "FID", "value": 12.3, "low": 12.1, "high": 12.6, "n": 30000, "card": {}}
    (tmp_path / "numbers.jsonl").write_text(json.dumps(numbers) + "\n")
    (cascade / "notes.pkl").write_bytes(b"of my own")
    words = ["push", cascade, "hf:me/tiny", "--license=mit", f"--evaluation={tmp_path / 'numbers.jsonl'}"]
    done = run(server, *words)
    assert done.returncode == 0 and done.stdout.startswith(f"{server.url}/me/tiny/commit/"), done.stderr
    files = server.hub.repositories["me/tiny"][server.hub.newest["me/tiny"]]
    assert {"README.md", "decoder/weights.safetensors", "clip/config.json"} <= files.keys()
    assert "notes.pkl" not in files
    assert "| FID | 12.3 | 12.1 to 12.6 | 30,000 |" in files["README.md"].decode()

    found = []
    for bundle, environment in ((cascade, {}), ("hf:me/tiny", {}), ("hf:me/tiny", {"HF_HUB_OFFLINE": "1"})):
        out = tmp_path / str(len(found))
        words = ["sample", "--bundle", bundle, "--prompt", "a red apple", "-n", 1, "--out", out]
        drawn = run(server, *words, **environment)
        assert drawn.returncode == 0, drawn.stderr
        from PIL import Image

        found.append(Image.open(out / "a_red_apple_0_0.png").tobytes())
    assert found[0] == found[1] == found[2]


def test_bundles_are_fetched_by_their_folder_and_revision(cascade, server):
    first = uploaded(server, cascade)
    server.hub.commit("me/tiny", {"clip/config.json": b"{}"})
    assert load_bundle(f"hf:me/tiny/clip@{first}").stage == "clip"
    assert not any("decoder/" in line for line in server.hub.log), "nothing else is fetched"
    with pytest.raises(UserError):
        load_bundle("hf:me/tiny/clip")
    assert cli.load_config(f"hf:me/tiny/decoder/config.json@{first}").stage == "decoder"


def test_no_pickle_is_ever_asked_for(cascade, server):
    uploaded(server, cascade, **{"evil.pkl": b"x", "decoder/pytorch_model.bin": b"x", "code.py": b"x"})
    names = {path.name for path in to_path("hf:me/tiny").rglob("*")}
    assert "weights.safetensors" in names and not names & {"evil.pkl", "pytorch_model.bin", "code.py"}
    assert not any(line.endswith((".pkl", ".bin", ".py")) for line in server.hub.log)


def test_what_was_changed_on_the_way_is_refused(cascade, server):
    weights = bytearray((cascade / "clip/weights.safetensors").read_bytes())
    weights[-5] ^= 1
    uploaded(server, cascade, **{"clip/weights.safetensors": bytes(weights)})
    with pytest.raises(UserError, match="is not what was written: its sha256 differs"):
        load_bundle("hf:me/tiny/clip")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("hf:nobody/nothing", "hf:nobody/nothing: there is no such repository, or it is private: run `hf auth login`"),
        ("hf:me/tiny@v7", "hf:me/tiny@v7: the repository has no such revision"),
        ("hf:me/tiny/upsampler_9", "hf:me/tiny/upsampler_9: the repository me/tiny has no upsampler_9"),
        ("hf:tiny", "hf:tiny: expected hf:OWNER/NAME, with /FOLDER or @REVISION"),
        ("hf:me/../../etc", "expected hf:OWNER/NAME"),
        ("hf:me/a--b", "hf:me/a--b: the Hub says: "),
    ],
)
def test_what_is_not_there_is_one_line(cascade, server, place, says):
    uploaded(server, cascade)
    with pytest.raises(UserError, match=says) as caught:
        to_path(place)
    assert "\n" not in str(caught.value)


def test_without_the_hub_and_without_a_copy(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached, and is not in the cache: is this machine online"):
        to_path("hf:me/tiny")


def test_nothing_is_written_there_but_by_push():
    with pytest.raises(UserError, match="--out hf:me/tiny: the Hub is read only here: give a folder"):
        output_folder("hf:me/tiny")


def test_a_card_says_what_the_models_are(cascade, capsys):
    assert push.main(["push", str(cascade), "hf:me/tiny", "--license=cc-by-sa-4.0", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("---\nlicense: cc-by-sa-4.0\nlibrary_name: unclip_jax\n")
    assert "# tiny\n" in text and "unclip sample --bundle hf:me/tiny --prompt" in text
    count = sum(array.size for array in jax.tree.leaves(load_bundle(cascade / "decoder").params))
    assert f"| `decoder` | decoder | {count:,} | tfds:emoji_scenes/single_64 |" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{cascade}", "me/tiny", "--license=mit"], "me/tiny: expected hf:OWNER/NAME"),
        (["{cascade}", "hf:me/tiny"], "required: --license"),
        (["{empty}", "hf:me/tiny", "--license=mit"], "holds no bundle"),
        (["{cascade}", "hf:me/tiny", "--license=mit", "--evaluation={empty}/x"], "is no output of `evaluate"),
    ],
)
def test_mistakes_in_pushing_are_one_line(words, says, cascade, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"cascade": cascade, "empty": tmp_path / "empty"}
    with pytest.raises(UserError, match=says):
        push.main(["push", *(word.format(**places) for word in words)])


@pytest.mark.parametrize("line", [
    [1], 5, {}, {"name": "FID", "value": "x", "low": 1, "high": 2, "n": 3},
    {"name": "FID", "value": None, "low": 1, "high": 2, "n": 3},
    {"name": "FID", "value": 1, "low": [], "high": 2, "n": 3},
])  # fmt: skip
def test_numbers_of_another_kind_are_no_evaluation(tmp_path, line):
    (tmp_path / "numbers.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match=r"--evaluation .*numbers\.jsonl is no output of `evaluate"):
        push.read_evaluation(str(tmp_path / "numbers.jsonl"))
