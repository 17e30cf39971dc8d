"""Reads Karlo, the public unCLIP (github.com/kakaobrain/karlo): CLIP, prior, decoder and an upsampler of seven steps.

Here its own repository's files are read; `diffusers_unclip` reads the folder that diffusers publishes. Both convert the
networks by `karlo_stages`.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unclip_jax.errors import UserError
from unclip_jax.pretrained import Converted, Options, diffusers_unclip, openai_clip, tokenizers
from unclip_jax.pretrained.karlo_stages import convert_decoder, convert_prior, convert_upsampler
from unclip_jax.pretrained.state_dict import StateDict, read_tensors, read_torch, to_numpy

FILES = {  # of the repository's release; the numbers in place of * are training steps
    "prior": "prior-ckpt-*.ckpt",
    "decoder": "decoder-ckpt-*.ckpt",
    "upsampler": "improved-sr-ckpt-*.ckpt",
    "statistics": "ViT-L-14_stats.th",
    "clip": "ViT-L-14.pt",
}


def read_folder(folder: Path, options: Options) -> Iterator[Converted]:
    """Yields the models of either release, one at a time, CLIP first.

    folder: diffusers', which has a model_index.json; or one of the repository's own files, FILES, with CLIP's
    bpe_simple_vocab_16e6.txt.gz beside them. options: for the repository's files, which have no configs. Raises
    UserError for files that are missing, damaged or of another model.
    """
    if (folder / "model_index.json").exists():
        yield from diffusers_unclip.read_folder(folder, options)
        return
    found = {name: sorted(folder.glob(pattern)) for name, pattern in FILES.items()}
    missing = [FILES[name] for name, paths in found.items() if len(paths) != 1]
    if missing:
        raise UserError(f"{folder} is not Karlo: it has neither model_index.json nor one each of {', '.join(missing)}")
    paths = {name: paths[0] for name, paths in found.items()}
    vocabulary = tokenizers.read_clip(folder)
    weights = {name: read_tensors(path) for name, path in paths.items() if name != "statistics"}

    def part(name: str, prefix: str) -> StateDict:
        return StateDict(weights[name], str(paths[name]), prefix)

    size, dtype = options.image_size or 64, options.dtype
    clip = openai_clip.convert(part("clip", ""), dtype, options.head_channels, unit_norm=False)
    yield Converted("clip", *clip, vocabulary)
    del clip  # so that only one model is in memory at a time
    mean, std = _statistics(paths["statistics"])
    prior = convert_prior(part("prior", "model."), mean, std, dtype, options.heads or 32)
    yield Converted("prior", *prior, None)
    del prior
    decoder = convert_decoder(part("decoder", "model."), size, dtype, options.head_channels)
    yield Converted("decoder", *decoder, None)
    del decoder
    networks = (part("upsampler", f"model_{steps}.") for steps in ("first_steps", "last_step"))
    yield Converted("upsampler_256", *convert_upsampler(*networks, 4 * size, dtype), None)


def _statistics(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads mean and standard deviation of CLIP's image embeddings, each (dim,)."""
    values = read_torch(path)
    if not (isinstance(values, tuple | list) and len(values) == 2 and all(hasattr(v, "shape") for v in values)):
        raise UserError(f"{path} does not hold mean and standard deviation: download it again")
    return tuple(to_numpy(value).reshape(-1) for value in values)
