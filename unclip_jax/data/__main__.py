"""Prepares data: builds datasets, embeds them with CLIP once, makes tokenizers, filters pictures.

    python -m unclip_jax.data build --source folder:mine --out /data/tfds --name mine
    python -m unclip_jax.data embed --config=configs/prior_diffusion.py:tiny --config.clip.bundle=runs/clip/bundle \\
        --out=embeddings
    python -m unclip_jax.data tokenizer --config=configs/clip.py:tiny --out=tokenizer.model
    python -m unclip_jax.data filter apply --filter people.npz --clip runs/clip/bundle --pictures mine --out kept.txt

embed embeds every picture and every caption of the training and the held-out split. Priors and decoders are then
trained with --config.data.embeddings=embeddings. With --config.data.crop=dalle, --crops=4 embeds four random crops of
each picture, of which training draws one in each epoch. After a stop the same command goes on: files that are finished
are not made again. Where several processes run, each makes files of its own; Cloud TPU and SLURM are detected.

tokenizer trains the tokenizer of a model on captions of the training split. Models are then trained with
--config.data.tokenizer=tokenizer.model. Training makes one by itself where none is named.

build makes a TFDS dataset of pictures in any form that training reads, and leaves some out: `data build --help`.

filter trains, checks and applies a filter of pictures such as GLIDE's: `data filter --help`.
"""

import argparse

import jax

from unclip_jax import build_dataset, cli, filter_pictures
from unclip_jax.data.embeddings import COMMAND
from unclip_jax.embed import embed_dataset
from unclip_jax.errors import UserError
from unclip_jax.own_tokenizer import make_tokenizer
from unclip_jax.paths import output_folder, to_path
from unclip_jax.training import preflight

MODULES = {"build": build_dataset, "filter": filter_pictures}  # of commands that take no config
FLAGS: dict[str, dict[str, tuple[type, object, str]]] = {
    "embed": {
        "out": (str, None, "folder to write to"),
        "dtype": (str, "float16", "type of the stored embeddings: float16, or float32 in twice the space"),
        "crops": (int, 1, "random crops of each picture, where data.crop is not center"),
    },
    "tokenizer": {"out": (str, None, "file to write")},
}
EXAMPLES = {"embed": "a folder, such as --out=embeddings", "tokenizer": "a file, such as --out=tokenizer.model"}


def parse(argv: list[str]) -> "cli.FlagValues | argparse.Namespace":
    """Reads the command line: of embed and tokenizer FLAGS and `config`. Raises UserError for what is wrong with it."""
    action = "".join(argv[1:2])
    if action in MODULES:
        return MODULES[action].parse(argv[1:])
    if action not in FLAGS:
        others = ", ".join(["tokenizer", *MODULES])
        raise UserError(f"expected {COMMAND} --config=configs/prior_diffusion.py:tiny --out=DIR, or {others}")
    flags = cli.parse([argv[0], *argv[2:]], FLAGS[action] | preflight.FLAGS)
    if not flags.out:
        raise UserError(f"--out is {flags.out!r}: expected {EXAMPLES[action]}")
    return flags


def main(argv: list[str]) -> int:
    if argv[1:2] and argv[1] in MODULES:
        return MODULES[argv[1]].main(argv[1:])
    flags = parse(argv)
    with preflight.joined(flags):
        if argv[1] == "tokenizer":
            make_tokenizer(flags.config, to_path(flags.out))
            return 0
        cli.enable_compilation_cache()
        who = jax.process_index(), jax.process_count()
        embed_dataset(flags.config, output_folder(flags.out), *who, flags.dtype, flags.crops)
    return 0


if __name__ == "__main__":
    cli.run(main)
