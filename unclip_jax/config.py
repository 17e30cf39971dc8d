"""Sections that configs are made of: each key that several models have is explained here, once.

A function returns its arguments as a dict: a section of a config, or some keys of one. No argument has a default: the
numbers of a model stand in its own file of configs/, and so does the meaning of a key that no other model has. A config
of your own is written in the same way:

    from unclip_jax import config

    PAPER = config.recipe(
        stage="upsampler", dtype="bfloat16", mesh=config.mesh(data=-1, fsdp=1),
        model=dict(**config.pictures(image_size=256), unet=config.unet(channels=320, …), …),
        …
    )

    def get_config(size="paper"):
        return config.sized(size, PAPER, small=dict(train=dict(batch_size=64)), tiny={})

`python -m unclip_jax.train --config=my_config.py:small --workdir=…` trains it. docs/configs.md lists all keys with the
papers' values.
"""

import difflib
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict


def sized(size: str, paper: dict, **sizes: dict) -> ConfigDict:
    """Returns the config `paper`, with what the one of `sizes` that `size` names changes of it.

    Raises ValueError for another size, and for a change of a key that `paper` does not have.
    """
    sizes = {"paper": {}} | sizes
    if size not in sizes:
        raise ValueError(f"config size {size!r}: expected one of {', '.join(sizes)}")
    known = sorted(flat_keys(paper))
    for key in flat_keys(sizes[size]):
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, 0)[0]
            raise ValueError(f"{size} changes {key!r}, which paper does not have; the nearest is {nearest!r}")
    config = ConfigDict(paper)
    config.update(sizes[size])
    return config


def flat_keys(config: ConfigDict | dict, prefix: str = "") -> Iterator[str]:
    """Yields each key that holds a value, with its sections, such as "model.unet.channels"; also an empty section."""
    return (key for key, _ in flat_items(config, prefix))


def flat_items(config: ConfigDict | dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the keys of `flat_keys` with their values."""
    for name, value in config.items():
        within = isinstance(value, ConfigDict | dict) and len(value)
        yield from flat_items(value, f"{prefix}{name}.") if within else [(f"{prefix}{name}", value)]


# What models were before a key existed: stage ("" for all) → key → value.
BEFORE = {
    "": {"data.min_side": 0, "data.max_aspect": 0.0, "data.weights": (), "data.workers": 0},
    "decoder": {"model.embedding": "image"},
    "upsampler": {
        "model.caption": "none",
        "model.unet.attention": (),
        "model.unet.middle_attention": False,
        "model.unet.head_channels": 0,
        "model.unet.heads": (1, 1),
        "diffusion.drop_caption": 0.0,
        "sampling.guidance_scale": 1.0,
    },
}


# Keys that name a place. Runs are compared by what is there, not by its name: data that were moved are the same data.
PLACES = ("data.source", "data.data_dir", "data.tokenizer", "data.embeddings")
PLACES += ("clip.bundle", "clip.config", "init.bundle")


def completed(config: ConfigDict) -> ConfigDict:
    """Adds to a stored config the keys that configs of its stage did not have yet when it was stored."""
    known, before = set(flat_keys(config)), BEFORE[""] | BEFORE.get(config.get("stage"), {})
    missing = {key: value for key, value in before.items() if key not in known and key.partition(".")[0] in config}
    config.update_from_flattened_dict(missing)
    return config


def _extended(arguments: dict, section: Callable[..., dict]) -> dict:
    """Returns the section that the rest of a function's arguments make, together with its own."""
    return section(**arguments.pop("rest")) | arguments


def recipe(
    *,
    stage: str,  # Kind of model: "clip", "prior_diffusion", "prior_ar", "decoder", "upsampler" or "glide".
    dtype: str,  # Type of matrix products and convolutions: "bfloat16" or "float32". All else is float32.
    model: dict,  # Form and size of the networks.
    init: dict,  # Model that training starts from.
    data: dict,  # Pictures and captions.
    optim: dict,  # Optimizer, learning rate and moving average.
    train: dict,  # Length of the run, and how it is looked after.
    mesh: dict,  # Layout of the model over the devices.
    **sections: dict,
) -> dict:
    """A whole config. sections: those that only some stages have: `clip`, `prior`, `diffusion`, `sampling`."""
    shared = dict(model=model, init=init, data=data, optim=optim, train=train, mesh=mesh)
    return dict(stage=stage, dtype=dtype, **shared, **sections)


# Keys of the section `model`, and sections within it.


def pictures(*, image_size: int) -> dict:  # Side of the model's square pictures, in pixels.
    return locals()


def embedding(*, embedding_dim: int) -> dict:  # Numbers in a CLIP embedding: model.dim of the CLIP.
    return locals()


def reader(
    *,
    caption: str,  # Reader of captions: "own", the model itself; "clip", CLIP's text tower; "none", of upsamplers.
) -> dict:
    return locals()


def inpainting(*, inpaint: bool) -> dict:  # The model also takes the known pixels of a picture and fills in the rest.
    return locals()


def memory(*, remat: bool) -> dict:  # Activations are computed twice instead of kept: less memory, more time.
    return locals()


def enlargement(
    *,
    factor: int,  # Side of the large picture over side of the small one.
    interpolation: str,  # Interpolation of the small picture: "bicubic", "bilinear" or "antialiased_bicubic".
    round_low_res: bool,  # A small picture that another model drew is rounded to 8 bits first.
) -> dict:
    return locals()


def upsampler(
    *,
    patch: int,  # Side of the window of a picture that is trained on, in pixels; at most image_size.
    last_step: bool,  # A second network, which training leaves alone, takes the last step of sampling: Karlo's weights.
) -> dict:
    return locals()


def clip_model(
    *,
    dim: int,  # Numbers in an embedding.
    activation: str,  # Activation of both transformers: "gelu" or "quick_gelu".
    initial_scale: float,  # Factor of the cosines in the loss before the first step; it is learned.
    max_scale: float,  # Largest factor of the cosines that may be learned.
    mean: tuple[float, float, float],  # Mean of red, green and blue, in [0, 1], which is subtracted from pictures.
    std: tuple[float, float, float],  # Standard deviation of red, green and blue, by which pictures are divided.
    resize: str,  # Resizing of pictures: "area", each pixel the mean of what it covers; "bicubic", as OpenAI's CLIP.
    unit_norm: bool,  # Embeddings are given out at length 1; False: as the networks make them.
    **rest,
) -> dict:
    return _extended(locals(), memory)


def transformer(
    *,
    width: int,  # Channels; a multiple of heads.
    depth: int,  # Transformer blocks.
    heads: int,  # Attention heads in each block.
) -> dict:
    return locals()


def text(
    *,
    vocab_size: int,  # Pieces that the tokenizer may have at most.
    context: int,  # Tokens of a caption at most; a longer caption is cut.
    **rest,
) -> dict:
    """Transformer that reads captions."""
    return _extended(locals(), transformer)


def image(
    *,
    patch: int,  # Side of a patch, in pixels; image_size is a multiple of it.
    timesteps: int,  # Timesteps of the diffusion that the tower is told of; 0: it sees clean pictures.
    **rest,
) -> dict:
    """Vision transformer that embeds pictures."""
    return _extended(locals(), transformer)


def unet(
    *,
    channels: int,  # Channels of the first level; a multiple of norm_groups and head_channels.
    channel_mult: tuple[int, ...],  # Channels of each level in multiples of `channels`; each next has half the side.
    res_blocks: int,  # Residual blocks of each level on the way down; on the way up there is one more.
    norm_groups: int,  # Groups of group normalisation.
    scale_shift: bool,  # The timestep scales and shifts what is normalised; False: it is added before.
    resample_blocks: bool,  # Residual blocks halve and double the side; False: convolutions do.
    dropout: float,  # Share of features dropped in training, from 0 to below 1.
    **rest,
) -> dict:
    """U-Net of ADM (arXiv 2105.05233)."""
    return _extended(locals(), memory)


def attention_unet(
    *,
    attention: tuple[int, ...],  # Downsampling factors of the levels that attend: 8 is an eighth of image_size.
    middle_attention: bool,  # There is attention between the way down and the way up too.
    head_channels: int,  # Channels of an attention head; 0: `heads` says how many heads there are.
    heads: tuple[int, int],  # Attention heads on the way down and on the way up, where head_channels is 0.
    **rest,
) -> dict:
    return _extended(locals(), unet)


# Sections that only some stages have.


def clip(
    *,
    bundle: str,  # Bundle of the trained CLIP: `bundle` in the workdir of its run.
    config: str,  # Config of a CLIP that is trained first, into workdir/clip, where no bundle is named.
) -> dict:
    """CLIP whose embeddings the model takes or makes."""
    return locals()


def diffusion(
    *,
    schedule: str,  # Noise schedule: "cosine" or "linear".
    timesteps: int,  # Timesteps of the whole chain, from which training draws.
    predicts: str,  # Prediction of the network: "eps", the noise, or "x0", the data without it.
    learned_variance: bool,  # The network predicts the variance of each step too; False: it is fixed.
    snr_clip: tuple[float, ...],  # (low, high): errors of x0 are weighted by clip(SNR, low, high); (): by 1.
) -> dict:
    """Noise that is added, and what is learned of it."""
    return locals()


def caption_diffusion(
    *,
    drop_caption: float,  # Share of training examples without caption, from 0 to 1, for guidance.
    **rest,
) -> dict:
    return _extended(locals(), diffusion)


def upsampler_diffusion(
    *,
    degradation: str,  # Degradation of small pictures in training: "none", "blur", or "bsr" by data/bsr.py.
    blur_probability: float,  # Share of training examples that "blur" blurs, from 0 to 1.
    blur_sigma: float,  # Standard deviation of "blur", in pixels of the small picture; its kernel has 3 × 3.
    **rest,
) -> dict:
    return _extended(locals(), caption_diffusion)


def sampling(
    *,
    sampler: str,  # Sampler: "ddpm", "ddim", "dpm++" (DPM-Solver++) or, in the diffusion prior, "analytic".
    steps: str,  # Sampling steps: a number, numbers by section, "k/n", "ddimN", "logsnrN", "fast27" (see schedule.py).
    eta: float,  # Noise that "ddim" adds: 0, none; 1, as much as "ddpm".
    clip_x0: float,  # Largest magnitude of the predicted x0, which is clipped to it; 0: no clipping.
    temperature: float,  # Factor of the noise that sampling starts from.
) -> dict:
    """Sampling of the trained model, in evaluations and where no other is asked for."""
    return locals()


def guided_sampling(
    *,
    guidance_scale: float,  # Scale of classifier-free guidance: 1, none; more, nearer the caption.
    **rest,
) -> dict:
    return _extended(locals(), sampling)


# Sections that all stages have.


def init(
    *,
    bundle: str,  # Bundle of the trained model; "": none, all parameters are random.
    model: bool,  # Sections model, diffusion and sampling are the bundle's, but for keys that the command line sets.
) -> dict:
    """Model that training starts from."""
    return locals()


def data(
    *,
    source: str,  # Dataset: "tfds:NAME", "folder:PATH", "tars:PATTERN", "parquet:…", "arrow:…"; "A + B": both, mixed.
    weights: tuple[float, ...],  # Shares of mixed datasets in a batch; (): in proportion to their numbers of records.
    data_dir: str,  # Folder of TFDS datasets; emoji scenes are drawn into it.
    split: str,  # Split that is trained on.
    eval_split: str,  # Split that is evaluated and never trained on.
    image_feature: str,  # Name of the picture in a TFDS dataset or a table.
    caption_feature: str,  # Name of the captions in a TFDS dataset, table or JSON file; "a/b" for b within a.
    min_side: int,  # Shorter side in pixels below which a picture is skipped; 0: none is, and small ones are enlarged.
    max_aspect: float,  # Longer side over shorter above which a picture is skipped; 0: none is.
    crop: str,  # Square cut of a picture: "dalle", of random place and scale (arXiv 2102.12092); "center", the middle.
    threads: int,  # Threads that read and cut pictures, in each process of the run.
    workers: int,  # Processes that share these threads and need a core each; 0: the threads are the run's own.
) -> dict:
    return locals()


def caption_data(
    *,
    tokenizer: str,  # File of a sentencepiece model; "": one is trained on the captions.
    **rest,
) -> dict:
    return _extended(locals(), data)


def embedding_data(
    *,
    embeddings: str,  # Folder of embeddings that the command `data embed` made; "": CLIP runs in each step.
    **rest,
) -> dict:
    return _extended(locals(), caption_data)


def adam(
    *,
    learning_rate: float,  # Learning rate after the warm-up.
    warmup_steps: int,  # Steps of the warm-up, in which the learning rate rises linearly; 0: none.
    schedule: str,  # Learning rate after the warm-up: "constant", or "cosine" or "linear" to 0 at train.steps.
    b1: float,  # Decay of Adam's mean gradient per step, from 0 to below 1.
    b2: float,  # Decay of Adam's mean squared gradient per step, from 0 to below 1.
    eps: float,  # Number that Adam adds to the root of the mean squared gradient.
    weight_decay: float,  # Decoupled weight decay, times the learning rate; not of gains and biases.
    clip_norm: float,  # Largest norm of the whole gradient, which is scaled down to it; 0: no clipping.
    ema_decay: float,  # Decay of the parameters' moving average per step, from 0 to below 1.
    accumulate: int,  # Microbatches that a batch is cut into: less memory, more time.
    frozen: tuple[str, ...],  # Parameters that are not trained: names, their beginnings up to a "/", or globs.
    lora_rank: int,  # Rank of the changes of kernels that alone are trained (arXiv 2106.09685); 0: all is trained.
) -> dict:
    return locals()


def sam_adam(
    *,
    sam_rho: float,  # Length of SAM's step (arXiv 2010.01412); 0: no SAM, which takes half of each step's time.
    sam_rows: int,  # Rows of the batch that take SAM's step together, in the paper one replica's; divides batch_size.
    **rest,
) -> dict:
    return _extended(locals(), adam)


def train(
    *,
    steps: int,  # Steps of the whole run.
    batch_size: int,  # Examples in each step, over all devices.
    seed: int,  # Seed of the parameters, of the order of examples and of the noise.
    log_every: int,  # Steps between lines of metrics.
    checkpoint_every: int,  # Steps between checkpoints.
    checkpoint_minutes: float,  # Minutes between checkpoints, which log_every steps may exceed; 0: no limit.
    sample_every: int,  # Steps between evaluations, with pictures of held-out examples.
    eval_size: int,  # Held-out examples in an evaluation: a sample by the seed, or all if there are fewer.
    draw_size: int,  # Of these, how many are drawn at most: the first.
    measure: tuple,  # Metrics of the drawn pictures: fid, sfid, kid, inception_score, precision_recall, alignment.
    inception: str,  # Folder that `pretrained inception` wrote, for all of these but alignment.
    reference: str,  # Statistics (.npz) for fid or sfid; "": those of the true pictures beside the drawn ones.
    keep: int,  # Newest checkpoints that are kept, at least 2.
    keep_every: int,  # Checkpoints of steps that this divides are kept besides; 0: none.
    max_skips: int,  # Steps in a row whose loss or gradient is not finite, before the run stops.
    watchdog_minutes: float,  # Minutes without a step before a run writes where its threads stand and exits; 0: never.
    expected_loss: tuple,  # Rows (step, low, high) of what runs showed; a loss outside is warned of.
) -> dict:
    return locals()


def mesh(
    *,
    data: int,  # Copies of the model, which share each batch; -1: as many as fsdp leaves devices for.
    fsdp: int,  # Devices over which a copy's parameters and Adam's state are split.
) -> dict:
    return locals()
