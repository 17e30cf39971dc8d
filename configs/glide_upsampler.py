"""GLIDE's upsampler: caption and 64 px picture → 256 px picture (tiny: 16 → 64 px).

    python -m unclip_jax.train --config=configs/glide_upsampler.py:tiny --workdir=runs/glide_upsampler

Fine-tuned from a trained one to fill in what is erased of the large picture (section 4.3), the small one given whole:

    python -m unclip_jax.train --config=configs/glide_upsampler.py:paper --workdir=runs/glide_upsampler_inpaint \\
        --config.init.bundle=runs/glide_upsampler/bundle --config.model.inpaint=True --config.train.steps=500000

paper  384 channels and a text path of width 1024, 1,541,195,142 parameters (GLIDE, section 4.1). Topology: ADM's from
       64 to 256 px, with heads as in the released model; 16 text layers, which make the paper's 1.5 billion. All else
       that is not published: as in configs/glide.py. For a TPU slice, with a dataset of your own.
small  Emoji scenes of two objects, for one GPU.
tiny   Emoji scenes of one object, for two CPU cores; not yet trained to its end.
"""

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    config = ConfigDict()
    config.stage = "glide"
    config.dtype = "bfloat16"  # of matrix products and convolutions; all else is float32
    config.model = ConfigDict(
        dict(
            image_size=256,
            factor=4,  # of enlargement
            interpolation="bicubic",  # of the low-resolution input; or "bilinear", "antialiased_bicubic"
            round_low_res=True,  # to 8 bits, when it is the picture of the stage before
            inpaint=False,  # takes known pixels in, to fill in the others
            unet=dict(
                channels=384,
                channel_mult=(1, 1, 2, 2, 4, 4),
                res_blocks=2,
                attention=(8, 16, 32),  # downsampling factors: 32, 16 and 8 pixels
                middle_attention=True,
                head_channels=64,
                heads=(0, 0),  # where head_channels is 0: their number, on the way down and up
                norm_groups=32,
                scale_shift=True,
                resample_blocks=True,
                dropout=0.0,
                remat=True,
            ),
            text=dict(vocab_size=50257, context=256, width=1024, depth=16, heads=16),
        )
    )
    config.init = ConfigDict(dict(bundle=""))  # a trained bundle to start from; "": from scratch
    config.diffusion = ConfigDict(
        dict(
            schedule="linear",
            timesteps=1000,
            predicts="eps",
            learned_variance=True,
            snr_clip=(),  # (low, high): an x0 error counts clip(SNR, low, high) times; (): plain mean
            drop_caption=0.0,  # it is not guided
        )
    )
    config.sampling = ConfigDict(
        dict(
            sampler="ddim",  # or "ddpm"
            steps="fast27",
            eta=0.0,
            clip_x0=1.0,
            temperature=0.997,  # times the noise that sampling starts from
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
            threads=16,
        )
    )
    config.optim = ConfigDict(
        dict(
            learning_rate=3e-4,
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
            steps=1_600_000,
            batch_size=512,  # over all devices
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
                    unet=dict(channels=64, res_blocks=1, remat=False),
                    text=dict(vocab_size=1024, context=32, width=256, depth=4, heads=4),
                ),
                data=dict(source="tfds:emoji_scenes/pair_256", crop="center"),
                optim=dict(warmup_steps=1000, ema_decay=0.999),
                train=dict(steps=50000, batch_size=32, sample_every=5000),
            )
        )
    elif size == "tiny":
        config.update(
            dict(
                dtype="float32",
                model=dict(
                    image_size=64,
                    unet=dict(
                        channels=24,
                        channel_mult=(1, 2, 2),
                        res_blocks=1,
                        attention=(4,),
                        head_channels=24,
                        norm_groups=8,
                        remat=False,
                    ),
                    text=dict(vocab_size=512, context=24, width=64, depth=2, heads=2),
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
                train=dict(steps=300, batch_size=8, checkpoint_every=300, sample_every=100000, keep=2),
            )
        )
    elif size != "paper":
        raise ValueError(f"config size {size!r}: expected paper, small or tiny")
    return config
