"""The first upsampler: 64 → 256 px (tiny: 16 → 64 px). Convolutions only, trained on patches.

    python -m unclip_jax.train --config=configs/upsampler_256.py:tiny --workdir=runs/upsampler_256

paper  320 channels, 729,710,726 parameters (unCLIP, appendix C, table 3; the spacing of its 27 steps is GLIDE's).
small  Emoji scenes of two objects, for one GPU.
tiny   Emoji scenes of one object, for two CPU cores: 144 s.
       PSNR of held-out patches 14.6 dB, of interpolation 15.2 dB: it draws edges, not means.
"""

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    config = ConfigDict()
    config.stage = "upsampler"
    config.dtype = "bfloat16"  # of matrix products and convolutions; all else is float32
    config.model = ConfigDict(
        dict(
            image_size=256,
            factor=4,  # of enlargement
            patch=64,  # side of the window trained on
            interpolation="bicubic",  # of the low-resolution input; or "bilinear", "antialiased_bicubic"
            round_low_res=True,  # to 8 bits, when it is the picture of the stage before
            last_step=False,  # a second network for the last step of sampling
            unet=dict(
                channels=320,
                channel_mult=(1, 2, 3, 4),
                res_blocks=3,
                norm_groups=32,
                scale_shift=True,
                resample_blocks=True,
                dropout=0.1,
                remat=True,
            ),
        )
    )
    config.diffusion = ConfigDict(
        dict(
            schedule="cosine",
            timesteps=1000,
            predicts="eps",
            learned_variance=True,
            snr_clip=(),  # (low, high): an x0 error counts clip(SNR, low, high) times; (): plain mean
            degradation="blur",  # of the low-resolution input: "blur", or "bsr" (in the data pipeline, data/bsr.py)
            blur_probability=0.5,
            blur_sigma=0.6,  # pixels of the low-resolution input; kernel of 3
        )
    )
    config.sampling = ConfigDict(
        dict(
            sampler="ddim",  # or "ddpm"
            steps="fast27",
            eta=0.0,
            clip_x0=1.0,
            temperature=1.0,  # times the noise that sampling starts from
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
            crop="dalle",  # random square crop and scale (arXiv 2102.12092); "center": none
            threads=16,
        )
    )
    config.optim = ConfigDict(
        dict(
            learning_rate=1.2e-4,
            warmup_steps=0,
            schedule="constant",  # "constant", or "cosine" or "linear" to zero at train.steps
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=0.0,
            clip_norm=0.0,  # 0: no clipping
            ema_decay=0.9999,
            accumulate=1,  # microbatches per step
        )
    )
    config.train = ConfigDict(
        dict(
            steps=1_000_000,
            batch_size=1024,  # over all devices
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
                    unet=dict(channels=128, res_blocks=2, dropout=0.0, remat=False),
                ),
                data=dict(source="tfds:emoji_scenes/pair_256", crop="center"),
                optim=dict(warmup_steps=1000, ema_decay=0.999),
                train=dict(steps=50000, batch_size=64, sample_every=5000),
            )
        )
    elif size == "tiny":
        config.update(
            dict(
                dtype="float32",
                model=dict(
                    image_size=64,
                    patch=32,
                    unet=dict(
                        channels=32,
                        channel_mult=(1, 2),
                        res_blocks=1,
                        norm_groups=8,
                        dropout=0.0,
                        remat=False,
                    ),
                ),
                diffusion=dict(predicts="x0", learned_variance=False, snr_clip=(0.3, 5.0)),
                sampling=dict(steps="8"),
                data=dict(source="tfds:emoji_scenes/single_64", crop="center", threads=2),
                optim=dict(
                    learning_rate=0.002,
                    warmup_steps=50,
                    schedule="cosine",
                    b2=0.99,
                    clip_norm=1.0,
                    ema_decay=0.99,
                ),
                train=dict(steps=600, batch_size=8, checkpoint_every=500, sample_every=100000, keep=2),
            )
        )
    elif size != "paper":
        raise ValueError(f"config size {size!r}: expected paper, small or tiny")
    return config
