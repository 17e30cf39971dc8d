"""CLIP: pictures and captions into one space, in which the prior and the decoder live.

    python -m unclip_jax.train --config=configs/clip.py:tiny --workdir=runs/clip

paper  ViT-H/16 at 256 px and a causal text tower of 24 layers, 986,339,841 parameters (unCLIP, appendix C; batch,
       weight decay, warm-up and Adam's numbers from the CLIP paper). For a TPU slice, with a dataset of your own.
small  Emoji scenes of two objects, for one GPU.
tiny   Emoji scenes of one object, for two CPU cores: 108 s; then 100% of
       64 held-out pictures and captions find each other.
"""

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    config = ConfigDict()
    config.stage = "clip"  # the kind of model: a name of unclip_jax/stages/__init__.py
    config.dtype = "bfloat16"  # of matrix products and convolutions, or "float32"; all else is float32
    config.model = ConfigDict(
        dict(
            image_size=256,  # side of its square pictures, pixels
            dim=1024,  # numbers of an embedding
            image=dict(  # the tower that sees: a vision transformer
                patch=16,  # side of a patch, pixels
                width=1280,  # channels; a multiple of heads
                depth=32,  # blocks
                heads=20,  # of attention, in each block
                timesteps=0,  # of diffusion, told to a noise-aware tower; 0: it sees clean pictures
            ),
            text=dict(  # the transformer that reads captions
                vocab_size=49408,  # pieces that its tokenizer may have
                context=77,  # tokens of a caption; longer ones are cut
                width=1024,  # channels; a multiple of heads
                depth=24,  # blocks
                heads=16,  # of attention, in each block
            ),
            activation="quick_gelu",  # of the transformers: "gelu" or "quick_gelu"
            initial_scale=1 / 0.07,  # of the cosines in the loss, before it is learned
            max_scale=100.0,  # what it may grow to
            mean=(0.48145466, 0.4578275, 0.40821073),  # of pictures in [0, 1], as the public CLIP's
            std=(0.26862954, 0.26130258, 0.27577711),  # their standard deviation, likewise
            resize="area",  # of a picture to be looked at: as in training; "bicubic": as the public CLIP's
            unit_norm=True,  # embeddings are given out at length 1; else as they are
            remat=True,  # activations are computed twice instead of kept: less memory, more time
        )
    )
    config.data = ConfigDict(
        dict(
            source="",  # "tfds:NAME" or "folder:/pictures/with/captions"
            data_dir="~/tensorflow_datasets",  # where TFDS datasets lie; emoji scenes are drawn into it
            split="train",  # trained on
            eval_split="test",  # never trained on
            image_feature="image",  # the picture's name in a TFDS record
            caption_feature="caption",  # the text's name, or that of several texts
            tokenizer="",  # a sentencepiece model; "": one is trained on the captions
            crop="dalle",  # random square crop and scale (arXiv 2102.12092); "center": none
            threads=16,  # that read and cut pictures, in each process
        )
    )
    config.optim = ConfigDict(
        dict(
            learning_rate=3e-4,  # after warm-up
            warmup_steps=2000,  # in which it rises linearly; 0: none
            schedule="cosine",  # "constant", or "cosine" or "linear" to zero at train.steps
            b1=0.9,  # Adam's, of the mean gradient
            b2=0.98,  # Adam's, of the mean square
            eps=1e-6,  # Adam's, beside the root of the mean square
            weight_decay=0.2,  # times the learning rate; of matrices and kernels, not of gains and biases
            clip_norm=0.0,  # largest norm of the whole gradient; 0: no clipping
            ema_decay=0.9999,  # of the parameters' moving average, per step
            accumulate=1,  # microbatches per step
            sam_rho=0.1,  # length of SAM's step; 0: no SAM, and half the time
            sam_rows=64,  # rows of the batch that take it together: one replica's in the paper
        )
    )
    config.train = ConfigDict(
        dict(
            steps=650_000,  # of the whole run
            batch_size=32768,  # examples in a step, over all devices
            seed=0,  # of parameters, order of the data and noise
            log_every=50,  # steps between lines of metrics
            checkpoint_every=5000,  # steps between checkpoints
            sample_every=10000,  # steps between evaluations, with pictures of held-out examples
            eval_size=64,  # held-out examples that are evaluated
            keep=3,  # checkpoints
            keep_every=0,  # besides those, checkpoints of every step that this divides; 0: none
            max_skips=20,  # steps in a row whose loss or gradient is not finite, before the run stops
            watchdog_minutes=60.0,  # without a step, before a run writes where its threads stand and exits; 0: never
            expected_loss=(),  # (step, low, high), ...: what runs showed; a loss outside is warned of
        )
    )
    config.mesh = ConfigDict(
        dict(
            data=-1,  # copies of the model, which share each batch; -1: as many as fsdp leaves devices for
            fsdp=1,  # devices over which a copy's parameters and Adam's state are split
        )
    )
    if size == "small":
        config.update(
            dict(
                model=dict(
                    image_size=64,
                    dim=512,
                    image=dict(patch=8, width=512, depth=8, heads=8),
                    text=dict(vocab_size=1024, context=32, width=512, depth=6, heads=8),
                    remat=False,
                ),
                data=dict(source="tfds:emoji_scenes/pair_256", crop="center"),
                optim=dict(warmup_steps=500, weight_decay=0.1, ema_decay=0.999, sam_rho=0.0),
                train=dict(steps=10000, batch_size=1024, checkpoint_every=1000, sample_every=1000),
            )
        )
    elif size == "tiny":
        config.update(
            dict(
                dtype="float32",
                model=dict(
                    image_size=32,
                    dim=64,
                    image=dict(patch=8, width=128, depth=4, heads=2),
                    text=dict(vocab_size=512, context=24, width=128, depth=3, heads=2),
                    remat=False,
                ),
                data=dict(source="tfds:emoji_scenes/single_64", crop="center", threads=2),
                optim=dict(
                    learning_rate=0.001,
                    warmup_steps=50,
                    weight_decay=0.05,
                    clip_norm=1.0,
                    ema_decay=0.98,
                    sam_rho=0.0,
                ),
                train=dict(
                    steps=260,
                    batch_size=128,
                    checkpoint_every=500,
                    sample_every=100000,
                    keep=2,
                    expected_loss=((100, 0.25, 0.8), (150, 0.13, 0.4), (260, 0.13, 0.4)),
                ),
            )
        )
    elif size != "paper":
        raise ValueError(f"config size {size!r}: expected paper, small or tiny")
    return config
