"""A model's own tokenizer: made of captions alone, once, the same by the command as by training."""

from types import SimpleNamespace

import pytest
from shrink import save_pictures, small_config

from unclip_jax import own_tokenizer
from unclip_jax.data import __main__ as command
from unclip_jax.data.sources import open_source
from unclip_jax.data.tokenizer import Tokenizer, train_tokenizer
from unclip_jax.errors import UserError

READS = SimpleNamespace(texts={"tokens": ("own", 12, False)})
READS_BY_CLIP = SimpleNamespace(texts={"clip_tokens": ("clip", 12, True)})


@pytest.fixture
def folder(tmp_path):
    return save_pictures(tmp_path / "pictures")


def make(folder, file, *flags, config="clip"):
    source = f"--config.data.source=folder:{folder}"
    return command.main(["data", "tokenizer", f"--config=configs/{config}.py:tiny", source, f"--out={file}", *flags])


def config_of(folder, **data):
    config = small_config("clip").unlock()
    config.data.update(dict(source=f"folder:{folder}", threads=2) | data)
    return config


def train_captions(folder):
    source = open_source(f"folder:{folder}", "train", "", "", "")
    return [source[i]["caption"] for i in range(len(source))]


def test_command_makes_what_training_would(folder, tmp_path, capsys):
    file, beats = tmp_path / "new" / "tokenizer.model", []
    assert make(folder, file) == 0
    said = capsys.readouterr().err
    made = Tokenizer(file.read_bytes())
    assert f"tokenizer: {made.vocab_size} pieces, in {file}" in said
    assert made.model_bytes == train_tokenizer(train_captions(folder), 512).model_bytes

    config = config_of(folder)
    source = open_source(config.data.source, "train", "", "", "")
    beat = lambda: beats.append(1)  # noqa: E731
    own = own_tokenizer.own_tokenizer(config, READS, source, str(tmp_path / "run"), None, beat)
    assert own.model_bytes == made.model_bytes == (tmp_path / "run" / "tokenizer.model").read_bytes()
    assert len(beats) == len(source)

    config = config_of(folder, tokenizer=str(file))
    named = own_tokenizer.own_tokenizer(config, READS, None, str(tmp_path / "other"), None, beat)
    assert named.model_bytes == made.model_bytes and not (tmp_path / "other").exists()
    assert own_tokenizer.own_tokenizer(config, READS_BY_CLIP, None, "", None, beat) is None


def test_pictures_are_not_read(folder, tmp_path, monkeypatch):
    from unclip_jax.data import folders

    monkeypatch.setattr(folders.FolderRecords, "__getitem__", lambda *_: pytest.fail("a picture is read"))
    assert make(folder, tmp_path / "tokenizer.model") == 0


def test_a_vocabulary_larger_than_the_captions_is_said(folder, tmp_path, capsys):
    make(folder, tmp_path / "one.model")
    most = train_tokenizer(train_captions(folder), 10**5).vocab_size
    assert f"captions have {most} pieces, fewer than model.text.vocab_size=512" in capsys.readouterr().err
    make(folder, tmp_path / "two.model", f"--config.model.text.vocab_size={most}")
    assert "fewer than" not in capsys.readouterr().err
    assert (tmp_path / "two.model").read_bytes() != b""


def test_captions_are_spread_over_the_whole_split(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(own_tokenizer, "MOST_CAPTIONS", 4)
    make(folder, tmp_path / "tokenizer.model")
    every = train_captions(folder)
    few = [every[k * len(every) // 4] for k in range(4)]
    assert (tmp_path / "tokenizer.model").read_bytes() == train_tokenizer(few, 512).model_bytes


def refused(says, act, *arguments):
    with pytest.raises(UserError, match=says) as caught:
        act(*arguments)
    assert "\n" not in str(caught.value)


def test_mistakes_are_one_line(folder, tmp_path):
    file = tmp_path / "tokenizer.model"
    says, small = r"^model\.text\.vocab_size=100 has no room .* set it to", "--config.model.text.vocab_size=100"
    refused(says, make, folder, file, small)
    refused("this upsampler reads no captions itself", lambda: make(folder, file, config="upsampler_256"))
    refused("reads no captions itself", lambda: make(folder, file, "--config.model.caption=clip", config="decoder"))
    refused("is a folder: name a file in it", make, folder, tmp_path)
    refused("--out is None: expected a file", command.main, ["data", "tokenizer", "--config=configs/clip.py:tiny"])
    refused("data.source is empty", make, folder, file, "--config.data.source=")
    make(folder, file)
    refused("tokenizer.model is there already", make, folder, file)
    config = config_of(folder, tokenizer=str(file))
    config.model.text.vocab_size = 270
    says = r"has [0-9]+ pieces, more than the model's vocab_size=270: .* --config.model.text.vocab_size=[0-9]+$"
    refused(says, own_tokenizer.own_tokenizer, config, READS, None, str(tmp_path), None, None)
