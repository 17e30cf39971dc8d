"""Prepares data: builds a dataset, embeds it with CLIP once so that no training needs to, filters pictures.

    python -m unclip_jax.data build --source folder:mine --out /data/tfds --name mine
    python -m unclip_jax.data embed --config=configs/prior_diffusion.py:tiny --config.clip.bundle=runs/clip/bundle \\
        --out=embeddings
    python -m unclip_jax.data filter apply --filter people.npz --clip runs/clip/bundle --pictures mine --out kept.txt

embed embeds every picture and every caption of the training and the held-out split. Priors and decoders are then
trained with --config.data.embeddings=embeddings, and have the same loss as with CLIP in the step. After a stop the same
command goes on: files that are finished are not made again. Where several processes run, each makes files of its own.

build makes a TFDS dataset of pictures in any form that training reads, and leaves some out: `data build --help`.

filter trains, checks and applies a filter of pictures such as GLIDE's: `data filter --help`.
"""

import argparse

import jax

from unclip_jax import build_dataset, cli, filter_pictures
from unclip_jax.data.embeddings import COMMAND
from unclip_jax.embed import embed_dataset
from unclip_jax.errors import UserError
from unclip_jax.paths import output_folder
from unclip_jax.training import preflight

MODULES = {"build": build_dataset, "filter": filter_pictures}  # of commands that take no config


def parse(argv: list[str]) -> "cli.FlagValues | argparse.Namespace":
    """Reads the command line, of embed: `out` and `config`. Raises UserError for what is wrong with it."""
    if argv[1:2] and argv[1] in MODULES:
        return MODULES[argv[1]].parse(argv[1:])
    if argv[1:2] != ["embed"]:
        others = ", ".join(MODULES)
        raise UserError(f"expected {COMMAND} --config=configs/prior_diffusion.py:tiny --out=DIR, or {others}")
    flags = cli.parse([argv[0], *argv[2:]], {"out": (str, None, "folder to write to")})
    if not flags.out:
        raise UserError(f"--out is {flags.out!r}: expected a folder, such as --out=embeddings")
    return flags


def main(argv: list[str]) -> int:
    if argv[1:2] and argv[1] in MODULES:
        return MODULES[argv[1]].main(argv[1:])
    flags = parse(argv)
    preflight.join("", -1, -1, wait=300)  # else processes of a cluster would all be number 0 of 1
    cli.enable_compilation_cache()
    embed_dataset(flags.config, output_folder(flags.out), jax.process_index(), jax.process_count())
    return 0


if __name__ == "__main__":
    cli.run(main)
