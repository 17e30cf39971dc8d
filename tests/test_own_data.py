"""The commands of docs/own_data.md, each on small files of the format that it is for."""

import io
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from documents import ROOT, blocks, commands, shell
from pyarrow import parquet
from shrink import small_config

sys.path.append(str(Path(__file__).parent / "data"))
from records import picture, sample, save_shards, save_tar

from unclip_jax import train
from unclip_jax.data.pipeline import batches, evaluation_batch
from unclip_jax.data.sources import open_sources
from unclip_jax.data.transforms import ToExample

PAGE = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What the page has in /data, of twenty records each."""
    root, numbers = tmp_path_factory.mktemp("data"), range(20)
    save_shards(root / "pd12m")
    columns = {"caption": [f"caption {k}" for k in numbers], "key": [f"{k:09d}" for k in numbers],
               "jpg": [picture(k) for k in numbers]}  # fmt: skip
    parquet.write_table(pa.table(columns), root / "pd12m" / "00000.parquet")
    for name in ("cc12m/cc12m-train-0000", "cc3m/cc3m-train-0000", "cc3m/cc3m-validation-0000"):
        save_tar(root / f"{name}.tar", [file for k in numbers for file in sample(k)])

    image = pa.array([{"bytes": picture(k), "path": None} for k in numbers])
    sentences = [[{"raw": f"caption {k}", "tokens": ["caption"]}] * 2 for k in numbers]
    (root / "art" / "data").mkdir(parents=True)
    table = pa.table({"image": image, "sentences": sentences})
    parquet.write_table(table, root / "art" / "data" / "train-00000-of-00001.parquet", row_group_size=5)
    table = pa.table({"image": image, "caption": columns["caption"]})
    for split in ("train", "test"):
        (root / "art_on_disk" / split).mkdir(parents=True)
        file = root / "art_on_disk" / split / "data-00000-of-00001.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    (root / "art_on_disk" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')

    (root / "faces" / "train").mkdir(parents=True)
    for k in numbers:
        (root / "faces" / "train" / f"{k}.jpg").write_bytes(picture(k))
    rows = [json.dumps({"file_name": f"train/{k}.jpg", "title": f"caption {k}"}) for k in numbers]
    (root / "faces" / "metadata.jsonl").write_text("\n".join(rows))
    save_coco(root / "tfds", numbers)
    return root


def save_coco(data_dir, numbers):
    """A dataset of the name and the features that TFDS's coco_captions has."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():  # where TFDS has its own

        class CocoCaptions(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.1.0")
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014", version="1.1.0", description="COCO")]  # noqa: RUF012
            url_infos = {}  # noqa: RUF012

            def _info(self):
                captions = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
                features = {"image": tfds.features.Image(encoding_format="jpeg"), "captions": captions}
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(), "val": self._generate_examples()}

            def _generate_examples(self):
                for k in numbers:
                    captions = [{"id": i, "text": f"caption {k}"} for i in range(5)]
                    yield k, {"image": io.BytesIO(picture(k)), "captions": captions}

    CocoCaptions(data_dir=data_dir, config="2014", file_format="array_record").download_and_prepare()


def trainings(tmp_path):
    """The words of every command of the page that trains."""
    found = commands("\n".join(map(shell, blocks(PAGE))), tmp_path)
    return [words for words in found if words[:2] == ["unclip", "train"]]


def parsed(words, data):
    """The config of a command, with another folder in place of /data."""
    return train.parse([words[1], *(re.sub(r"(?<!\w)/data/", f"{data}/", word) for word in words[2:])]).config


def test_every_command_reads_its_data(data, tmp_path):
    found = trainings(tmp_path)
    assert len(found) == 9
    kinds = set()
    for words in found:
        d = parsed(words, data).data
        kinds |= {part.partition(":")[0] for part in d.source.split(" + ")}
        try:
            source, unseen = open_sources(
                d.source, d.weights, (d.split, d.eval_split), d.data_dir, d.image_feature, d.caption_feature
            )
        except Exception as error:
            raise AssertionError(f"{shlex.join(words)}: {error}") from error
        records = [part[k] for part in (source, unseen) for k in range(len(part))]
        assert len(source) >= 16 and len(records) >= 20, words
        for record in records:
            said = record["caption"] if isinstance(record["caption"], str) else record["caption"][0]
            assert said.startswith("caption ") and record["image"] == picture(int(said.split()[1])), words
        to_example = ToExample({"image": 8}, {}, "center", None)
        assert next(batches(source, to_example, 6, 0))["image"].shape == (6, 8, 8, 3)
        assert evaluation_batch(unseen, to_example, 4, 0)["image"].any()
    assert kinds == {"tars", "parquet", "arrow", "folder", "tfds"}


@pytest.mark.slow
def test_a_mixture_is_trained_on(data, tmp_path):
    """The page's last command, of a small model, twice: on and after a stop."""
    words = trainings(tmp_path)[-1]
    given = parsed(words, data).data
    digests = []
    for name, lengths in (("whole", [4]), ("resumed", [2, 4])):
        for steps in lengths:
            config = small_config("clip")
            config.data.update({key: given[key] for key in given if key not in ("crop", "tokenizer")})
            config.train.update(dict(steps=steps))
            config.optim.schedule = "constant"  # else it depends on the steps of the whole run
            report = train.run(config, str(tmp_path / name))
        digests.append(report["sha256"])
    assert digests[0] == digests[1]
