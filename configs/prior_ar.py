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
    config.stage = "prior_ar"
    config.dtype = "bfloat16"  # of matrix products and convolutions; all else is float32
    config.model = ConfigDict(
        dict(
            embedding_dim=1024,
            num_codes=319,  # principal components of the embedding that are kept
            num_buckets=1024,  # of each
            num_dot_buckets=64,  # of the product of image and text embedding
            context=384,  # rows of the table of positions: the codes and what is told before them
            width=1664,
            depth=24,
            heads=26,
            text=dict(vocab_size=50257, context=256, width=2048, depth=24, heads=32),
            remat=True,
        )
    )
    config.prior = ConfigDict(
        dict(
            batches=32,  # of training, in which components and buckets are found before the first step
            outside=1e-4,  # share of those embeddings beyond each end of a component's buckets
            drop_text=0.1,
        )
    )
    config.sampling = ConfigDict(
        dict(
            guidance_scale=1.0,
            temperature=1.0,  # 0: the likeliest code each time
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
            data_dir="~/tensorflow_datasets",
            split="train",
            eval_split="test",  # never trained on
            image_feature="image",
            caption_feature="caption",
            tokenizer="",  # a sentencepiece model; "": one is trained on the captions
            crop="dalle",  # random square crop and scale (arXiv 2102.12092); "center": none
            embeddings="",  # folder written by `python -m unclip_jax.data embed`; "": CLIP runs in the step
            threads=16,
        )
    )
    config.optim = ConfigDict(
        dict(
            learning_rate=1.6e-4,
            warmup_steps=1000,
            schedule="constant",  # "constant", or "cosine" or "linear" to zero at train.steps
            b1=0.9,
            b2=0.91,
            eps=1e-10,
            weight_decay=4e-2,
            clip_norm=1.0,  # 0: no clipping
            ema_decay=0.999,
            accumulate=1,  # microbatches per step
        )
    )
    config.train = ConfigDict(
        dict(
            steps=1_000_000,
            batch_size=4096,  # over all devices
            seed=0,
            log_every=50,
            checkpoint_every=5000,
            sample_every=10000,  # evaluation and pictures of held-out examples
            eval_size=64,
            keep=3,  # checkpoints
        )
    )
    config.mesh = ConfigDict(
        dict(data=-1, fsdp=1)
    )  # devices; -1: what fsdp leaves. fsdp splits parameters and Adam state
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
                train=dict(steps=300, batch_size=128, checkpoint_every=500, sample_every=100000, keep=2),
            )
        )
    elif size != "paper":
        raise ValueError(f"config size {size!r}: expected paper, small or tiny")
    return config
