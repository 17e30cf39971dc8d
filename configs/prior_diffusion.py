"""The diffusion prior: caption and CLIP text embedding → CLIP image embedding.

    python -m unclip_jax.train --config=configs/prior_diffusion.py:tiny --workdir=runs/prior \\
        --config.clip.bundle=runs/clip/bundle

paper  24 layers of width 2048, 1,326,752,768 parameters (unCLIP, appendix C, table 3). The vocabulary and prior
       guidance are not published. The variances of its 64 steps are estimated after training.
small  Emoji scenes of two objects, for one GPU.
tiny   Emoji scenes of one object, for two CPU cores; trains its CLIP first if none is named: 133 s;
       cosine to the true embedding 0.94 on held-out captions (another caption's: 0.01).
"""

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    config = ConfigDict()
    config.stage = "prior_diffusion"
    config.dtype = "bfloat16"  # of matrix products and convolutions; all else is float32
    config.model = ConfigDict(
        dict(
            embedding_dim=1024,
            caption="own",  # tokens with a table of their own; "clip": the states of CLIP's text tower
            vocab_size=50257,
            context=256,
            width=2048,
            depth=24,
            heads=32,
            remat=True,
        )
    )
    config.diffusion = ConfigDict(
        dict(
            schedule="cosine",
            timesteps=1000,
            predicts="x0",
            learned_variance=False,
            snr_clip=(),  # plain mean squared error
            embedding_scale=17.2,  # unit vectors of 1024 numbers get the variance of pixels; 0.5375 √dim elsewhere
            whiten=False,  # embeddings by a mean and std that come with the weights
            drop_text=0.1,
        )
    )
    config.sampling = ConfigDict(
        dict(
            sampler="analytic",  # or "ddpm", "ddim"
            steps="64",
            eta=0.0,  # of ddim
            guidance_scale=1.0,
            clip_x0=0.0,  # 0: no clipping
            temperature=1.0,  # times the noise that sampling starts from
            draws=2,  # the one nearer the text embedding is kept
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
            learning_rate=1.1e-4,
            warmup_steps=1000,
            schedule="constant",  # "constant", or "cosine" or "linear" to zero at train.steps
            b1=0.9,
            b2=0.96,
            eps=1e-6,
            weight_decay=6e-2,
            clip_norm=1.0,  # 0: no clipping
            ema_decay=0.9999,
            accumulate=1,  # microbatches per step
        )
    )
    config.train = ConfigDict(
        dict(
            steps=600_000,
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
                    vocab_size=1024,
                    context=32,
                    width=512,
                    depth=8,
                    heads=8,
                    remat=False,
                ),
                diffusion=dict(embedding_scale=12.16),
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
                    vocab_size=512,
                    context=24,
                    width=128,
                    depth=4,
                    heads=2,
                    remat=False,
                ),
                diffusion=dict(embedding_scale=4.3),
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
                train=dict(steps=260, batch_size=128, checkpoint_every=500, sample_every=100000, keep=2),
            )
        )
    elif size != "paper":
        raise ValueError(f"config size {size!r}: expected paper, small or tiny")
    return config
