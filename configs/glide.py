"""GLIDE's base model: caption → 64 px picture (tiny: 16 px).

    python -m unclip_jax.train --config=configs/glide.py:tiny --workdir=runs/glide

From a trained one, as in the paper, models are fine-tuned that can be guided (section 4.2) or fill in what is erased of
a picture (section 4.3; the upsampler likewise):

    python -m unclip_jax.train --config=configs/glide.py:paper --workdir=runs/glide_guided \\
        --config.init.bundle=runs/glide/bundle --config.diffusion.drop_caption=0.2 --config.train.steps=500000
    python -m unclip_jax.train --config=configs/glide.py:paper --workdir=runs/glide_inpaint \\
        --config.init.bundle=runs/glide/bundle --config.diffusion.drop_caption=0.2 --config.train.steps=500000 \\
        --config.model.inpaint=True

paper  512 channels and a text path of 24 layers of width 2048, 3,554,938,374 parameters (GLIDE, section 4.1). Topology,
       learning rate, Adam and EMA: ADM's at 64 px. Vocabulary and context are not published: as in configs/decoder.py.
       Nor are the steps of fine-tuning: 500K are the released models'. For a TPU slice, with a dataset of your own.
small  Emoji scenes of two objects, for one GPU.
tiny   Emoji scenes of one object, for two CPU cores. It predicts x0, which learns faster in a short run than the
       papers' eps with a learned variance. Took 11 minutes on cores that were busy with other work.
"""

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    config = ConfigDict()
    config.stage = "glide"
    config.dtype = "bfloat16"  # of matrix products and convolutions; all else is float32
    config.model = ConfigDict(
        dict(
            image_size=64,
            factor=0,  # of enlargement; 0: nothing is enlarged
            inpaint=False,  # takes known pixels in, to fill in the others
            unet=dict(
                channels=512,
                channel_mult=(1, 2, 3, 4),
                res_blocks=3,
                attention=(2, 4, 8),  # downsampling factors: 32, 16 and 8 pixels
                middle_attention=True,
                head_channels=64,
                heads=(0, 0),  # where head_channels is 0: their number, on the way down and up
                norm_groups=32,
                scale_shift=True,
                resample_blocks=True,
                dropout=0.1,
                remat=True,
            ),
            text=dict(vocab_size=50257, context=256, width=2048, depth=24, heads=32),
        )
    )
    config.init = ConfigDict(dict(bundle=""))  # a trained bundle to start from; "": from scratch
    config.diffusion = ConfigDict(
        dict(
            schedule="cosine",
            timesteps=1000,
            predicts="eps",
            learned_variance=True,
            snr_clip=(),  # (low, high): an x0 error counts clip(SNR, low, high) times; (): plain mean
            drop_caption=0.0,  # 0.2 in fine-tuning, for guidance
        )
    )
    config.sampling = ConfigDict(
        dict(
            sampler="ddpm",  # or "ddim"
            steps="150",
            eta=0.0,  # of ddim
            guidance_scale=3.0,  # once fine-tuned for it
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
            steps=2_500_000,
            batch_size=2048,  # over all devices
            seed=0,
            log_every=50,
            checkpoint_every=4000,
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
                    unet=dict(channels=128, res_blocks=2, remat=False),
                    text=dict(vocab_size=1024, context=32, width=512, depth=6, heads=8),
                ),
                diffusion=dict(drop_caption=0.2),  # so that it can be guided at once
                data=dict(source="tfds:emoji_scenes/pair_256", crop="center"),
                optim=dict(warmup_steps=1000, ema_decay=0.999),
                train=dict(steps=100000, batch_size=128, sample_every=5000),
            )
        )
    elif size == "tiny":
        config.update(
            dict(
                dtype="float32",
                model=dict(
                    image_size=16,
                    unet=dict(
                        channels=24,
                        channel_mult=(1, 2, 4),
                        res_blocks=1,
                        attention=(2, 4),
                        head_channels=24,
                        norm_groups=8,
                        dropout=0.0,
                        remat=False,
                    ),
                    text=dict(vocab_size=512, context=24, width=64, depth=2, heads=2),
                ),
                diffusion=dict(
                    predicts="x0",
                    learned_variance=False,
                    snr_clip=(1.0, 5.0),  # the noisiest steps count: there the caption alone tells what to draw
                    drop_caption=0.2,  # so that it can be guided at once
                ),
                sampling=dict(sampler="ddim", steps="25"),
                data=dict(source="tfds:emoji_scenes/single_64", crop="center", threads=2),
                optim=dict(
                    learning_rate=0.003,
                    warmup_steps=100,
                    schedule="cosine",
                    b2=0.99,
                    clip_norm=1.0,
                    ema_decay=0.995,
                ),
                train=dict(steps=1600, batch_size=32, checkpoint_every=400, sample_every=100000, keep=2),
            )
        )
    elif size != "paper":
        raise ValueError(f"config size {size!r}: expected paper, small or tiny")
    return config
