"""The autoregressive prior: caption and CLIP text embedding → CLIP image embedding, as quantised PCA components.

    python -m unclip_jax.train --config=configs/prior_ar.py:tiny --workdir=runs/prior_ar \\
        --config.clip.bundle=runs/clip/bundle

paper  A text encoder of 24 layers of width 2048 and 24 layers of width 1664 over 319 codes (unCLIP, appendix C,
       table 3). The bounds of a code's buckets, the buckets of the dot product, the vocabulary and the guidance are
       not published.
small  Emoji scenes of two objects, for one GPU.
tiny   Emoji scenes of one object, for two CPU cores; trains its CLIP first if none is named. Took 7 minutes
       on cores that were busy with other work; cosine to the true embedding 0.85 on held-out captions, where the codes
       of the true embeddings themselves keep 0.99.
"""

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    config = ConfigDict()
    config.stage = "prior_ar"  # the kind of model: a name of unclip_jax/stages/__init__.py
    config.dtype = "bfloat16"  # of matrix products and convolutions, or "float32"; all else is float32
    config.model = ConfigDict(
        dict(
            embedding_dim=1024,  # numbers of CLIP's embeddings
            num_codes=319,  # principal components of the embedding that are kept
            num_buckets=1024,  # of each
            num_dot_buckets=64,  # of the product of image and text embedding
            context=384,  # rows of the table of positions: the codes and what is told before them
            width=1664,  # channels; a multiple of heads
            depth=24,  # blocks
            heads=26,  # of attention, in each block
            text=dict(  # the transformer that reads captions
                vocab_size=50257,  # pieces that its tokenizer may have
                context=256,  # tokens of a caption; longer ones are cut
                width=2048,  # channels; a multiple of heads
                depth=24,  # blocks
                heads=32,  # of attention, in each block
            ),
            remat=True,  # activations are computed twice instead of kept: less memory, more time
        )
    )
    config.prior = ConfigDict(
        dict(
            batches=32,  # of training, in which components and buckets are found before the first step
            outside=1e-4,  # share of those embeddings beyond each end of a component's buckets
            drop_text=0.1,  # share of examples without caption and text embedding, for guidance
        )
    )
    config.sampling = ConfigDict(
        dict(
            guidance_scale=1.0,  # 1: none; more: nearer the caption
            temperature=1.0,  # of the codes' logits; 0: the likeliest code each time
            dot_percentile=50.0,  # the dot product is one of those in training above this percentile
        )
    )
    config.clip = ConfigDict(
        dict(
            bundle="",  # the trained CLIP: its run's workdir/bundle
            config="",  # if no bundle is named: the CLIP config to train first, into workdir/clip
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
            embeddings="",  # folder written by `python -m unclip_jax.data embed`; "": CLIP runs in the step
            threads=16,  # that read and cut pictures, in each process
        )
    )
    config.optim = ConfigDict(
        dict(
            learning_rate=1.6e-4,  # after warm-up
            warmup_steps=1000,  # in which it rises linearly; 0: none
            schedule="constant",  # "constant", or "cosine" or "linear" to zero at train.steps
            b1=0.9,  # Adam's, of the mean gradient
            b2=0.91,  # Adam's, of the mean square
            eps=1e-10,  # Adam's, beside the root of the mean square
            weight_decay=4e-2,  # times the learning rate; of matrices and kernels, not of gains and biases
            clip_norm=1.0,  # largest norm of the whole gradient; 0: no clipping
            ema_decay=0.999,  # of the parameters' moving average, per step
            accumulate=1,  # microbatches per step
        )
    )
    config.train = ConfigDict(
        dict(
            steps=1_000_000,  # of the whole run
            batch_size=4096,  # examples in a step, over all devices
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
                    embedding_dim=512,
                    num_codes=128,
                    num_buckets=256,
                    context=130,
                    width=512,
                    depth=8,
                    heads=8,
                    text=dict(vocab_size=1024, context=32, width=512, depth=6, heads=8),
                    remat=False,
                ),
                data=dict(source="tfds:emoji_scenes/pair_256", crop="center"),
                optim=dict(learning_rate=0.0003, ema_decay=0.999),
                train=dict(steps=20000, batch_size=512, checkpoint_every=1000, sample_every=2000),
            )
        )
    elif size == "tiny":
        config.update(
            dict(
                dtype="float32",
                model=dict(
                    embedding_dim=64,
                    num_codes=24,
                    num_buckets=64,
                    num_dot_buckets=16,
                    context=26,
                    width=128,
                    depth=4,
                    heads=2,
                    text=dict(vocab_size=512, context=24, width=128, depth=2, heads=2),
                    remat=False,
                ),
                clip=dict(config="configs/clip.py:tiny"),
                data=dict(source="tfds:emoji_scenes/single_64", crop="center", threads=2),
                optim=dict(
                    learning_rate=0.001,
                    warmup_steps=50,
                    schedule="cosine",
                    weight_decay=0.01,
                    b2=0.99,
                    ema_decay=0.99,
                ),
                train=dict(
                    steps=300,
                    batch_size=128,
                    checkpoint_every=500,
                    sample_every=100000,
                    keep=2,
                    expected_loss=((50, 2.5, 5.3), (150, 2.1, 4.4), (300, 1.9, 4.0)),
                ),
            )
        )
    elif size != "paper":
        raise ValueError(f"config size {size!r}: expected paper, small or tiny")
    return config
