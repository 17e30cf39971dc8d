"""Drawing in bulk: what is read and refused; the same files for any number of devices and after any number of stops."""

import io
import json
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image
from shrink import compilation_cache, save_cascade

from unclip_jax import drawing, sample
from unclip_jax.cascade import Cascade
from unclip_jax.drawing import draw_file, read_prompts, read_run
from unclip_jax.errors import UserError
from unclip_jax.training import sharding

PROMPTS = [f"a {colour} {thing}" for thing in ("fox", "tent", "lemon") for colour in ("red", "blue", "green")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_cascade(tmp_path_factory.mktemp("cascade"))
    for name in ("upsampler_256", "upsampler_1024"):
        (folder / name).rename(folder / f"no_{name}")  # they take most of the time
    return folder


@pytest.fixture(scope="module")
def one(folder):
    with compilation_cache():
        yield Cascade.load(str(folder))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(drawing, "SHARD_PICTURES", 4)
    monkeypatch.setattr(drawing, "CHUNK_ROWS", 4)


def draw(cascade, out, prompts=PROMPTS, kind="tar", process=0, processes=1, seed=5, **settings):
    settings = {"models": cascade.identities()} | settings
    return draw_file(cascade, prompts, out, 1, seed, {}, settings, kind, process, processes)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(one, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "SHARD_PICTURES", 4)
        patch.setattr(drawing, "CHUNK_ROWS", 4)
        out = tmp_path_factory.mktemp("drawn")
        assert draw(one, out) == len(PROMPTS)
    return out


def images(folder):
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                found[member.name] = archive.extractfile(member).read()
    return found


def test_tars_hold_pictures_captions_and_numbers(undisturbed):
    assert sorted(path.name for path in undisturbed.iterdir()) == ["000000.tar", "000001.tar", "000002.tar", "run.json"]
    found = images(undisturbed)
    assert list(found)[:3] == ["00000000_000.png", "00000000_000.txt", "00000000_000.json"] and len(found) == 27
    for row, prompt in enumerate(PROMPTS):
        name = f"{row:08d}_000"
        assert found[f"{name}.txt"].decode() == prompt
        assert json.loads(found[f"{name}.json"]) == {"prompt": prompt, "seed": "5", "row": str(row), "draw": "0"}
        with Image.open(io.BytesIO(found[f"{name}.png"])) as picture:
            assert picture.text["prompt"] == prompt and "models" in json.loads(picture.text["settings"])
    run = json.loads((undisturbed / "run.json").read_text())
    assert run["prompts"] == 9 and len(run["prompts_sha256"]) == 64


def test_stopped_five_times_the_files_are_the_same(one, undisturbed, tmp_path, monkeypatch):
    """Each try is stopped while it writes its first or second shard."""
    real, written = drawing.write_bytes, []

    def stopping(path, data):
        if path.suffix == ".tar" and len(written) % 2:
            written.append(path)
            raise KeyboardInterrupt
        written.append(path)
        real(path, data)

    monkeypatch.setattr(drawing, "write_bytes", stopping)
    tries = 0
    while tries < 5:
        tries += 1
        try:
            draw(one, tmp_path)
            break
        except KeyboardInterrupt:
            pass
    monkeypatch.setattr(drawing, "write_bytes", real)
    draw(one, tmp_path)
    assert content(tmp_path) == content(undisturbed) and tries > 2
    assert draw(one, tmp_path) == 0, "nothing is drawn twice"


def test_processes_share_the_shards_and_draw_the_same(one, undisturbed, tmp_path):
    counts = [draw(one, tmp_path, process=process, processes=2) for process in (0, 1)]
    assert counts == [5, 4] and content(tmp_path) == content(undisturbed)


@pytest.mark.slow
def test_eight_devices_draw_what_one_draws(folder, undisturbed, tmp_path, monkeypatch):
    """Each holding all parameters, and four sharing them."""
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 256)  # so that the small networks' parameters are split, too
    with compilation_cache():
        draw(Cascade.load(str(folder), jax.devices()), tmp_path / "whole")
        shared = Cascade.load(str(folder), jax.devices(), fsdp=4)
        draw(shared, tmp_path / "split")
    for model in (shared.clip, shared.prior, shared.decoder):
        kernels = [leaf for leaf in jax.tree.leaves(model.params) if not leaf.sharding.is_fully_replicated]
        assert kernels and all(leaf.nbytes == 4 * leaf.addressable_shards[0].data.nbytes for leaf in kernels)
    assert content(tmp_path / "split") == content(tmp_path / "whole"), "the same program but for gathering"
    for (name, ours), theirs in zip(images(tmp_path / "whole").items(), images(undisturbed).values(), strict=True):
        if name.endswith(".png"):
            a, b = (np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (ours, theirs))
            assert np.abs(a - b).max() <= 1, "another program may round otherwise"
        else:
            assert ours == theirs


def test_a_shard_that_was_lost_is_drawn_among_those_it_was_drawn_with(one, tmp_path, monkeypatch):
    """Two shards at once, as on more than four devices: neither its pictures' places nor their rounding change."""
    monkeypatch.setattr(drawing, "SHARD_PICTURES", 2)
    draw(one, tmp_path)
    before = content(tmp_path)
    (tmp_path / "000001.tar").unlink()
    assert draw(one, tmp_path) == 2 and content(tmp_path) == before


@pytest.mark.parametrize("changed", [{"guidance": 3.0}, {"models": {}}, {"seed": 6}])
def test_another_run_in_the_same_folder_is_refused(one, undisturbed, changed):
    with pytest.raises(UserError, match=f"differs in {next(iter(changed))}: give another --out"):
        draw(one, undisturbed, **changed)
    with pytest.raises(UserError, match="differs in prompts, prompts_sha256"):
        draw(one, undisturbed, PROMPTS[:3])
    assert draw(one, undisturbed, bundle="the same models elsewhere", version="another") == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "\ufeffa red fox\n a blue tent \n"),
        ("a.jsonl", '{"prompt": "a red fox"}\n{"caption": "a blue tent"}\n'),
        ("a.csv", 'id,text\n1,"a red fox"\n2,a blue tent\n'),
    ],
)
def test_captions_of_every_kind_of_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_prompts(str(tmp_path / name)) == ["a red fox", "a blue tent"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", b"a fox\n\na tent\n", "caption 2 is empty"),
        ("a.txt", b"", "it holds no captions"),
        ("a.txt", b"\xff\xfe\xff", "is not text in UTF-8"),
        ("a.md", b"a fox", "expected a file that ends in .txt, .jsonl or .csv"),
        ("a.jsonl", b'{"prompt": "a fox"}\n{"title": "a tent"}', "line 2 has no prompt or caption or text"),
        ("a.jsonl", b"a fox", "line 1 is not JSON"),
        ("a.jsonl", b"[1]", "line 1 has no prompt"),
        ("a.csv", b"title\na fox\n", "line 2 has no prompt"),
        ("a.csv", b"prompt\n" + b"x" * 200_000, "is not CSV .field larger than"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON .nested too deep"),
    ],
)
def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=says) as caught:
        read_prompts(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["no JSON", "5", "[1]", "[" * 100_000])
def test_a_folder_with_another_run_json_is_named(tmp_path, text):
    assert read_run(tmp_path) == {}
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json is not of a run that drew pictures"):
        read_run(tmp_path)


@pytest.mark.parametrize(("fsdp", "says"), [("0", "a whole number from 1"), ("3", "a divisor of 8, the devices")])
def test_devices_that_cannot_share_a_model_are_named(folder, tmp_path, fsdp, says):
    with pytest.raises(UserError, match=f"--fsdp:? '?{fsdp}'?: .*{says}"):
        sample.main(["sample", f"--bundle={folder}", "--prompt=a fox", f"--fsdp={fsdp}", f"--out={tmp_path}"])


def test_command_draws_a_file_and_again_draws_one_of_it(folder, tmp_path):
    (tmp_path / "captions.txt").write_text("a red fox\na blue tent\n")
    options = [f"--bundle={folder}", f"--prompts={tmp_path / 'captions.txt'}", "-n", "2", "--format=png"]
    with compilation_cache():
        assert sample.main(["sample", *options, f"--out={tmp_path / 'out'}"]) == 0
        name = "00000001_001.png"
        assert sample.main(["sample", f"--again={tmp_path / 'out' / name}", f"--out={tmp_path / 'again'}"]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"{row:08d}_{draw:03d}.png" for row in (0, 1) for draw in (0, 1)] + ["run.json"]
    before, after = (np.asarray(Image.open(tmp_path / place / name)).astype(int) for place in ("out", "again"))
    assert np.abs(before - after).max() <= 1
