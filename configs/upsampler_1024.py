"""The second upsampler: 256 → 1024 px (tiny: 64 → 256 px). Convolutions only, trained on patches.

    python -m unclip_jax.train --config=configs/upsampler_1024.py:tiny --workdir=runs/upsampler_1024

paper  192 channels, 282,064,326 parameters (unCLIP, appendix C, table 3). Its input is corrupted by BSR degradation,
       made on the host (data/bsr.py).
small  Emoji scenes of two objects, for one GPU; BSR as well.
tiny   Emoji scenes of one object, for two CPU cores: 143 s. Its input is blurred, as the first upsampler's is.
       PSNR of held-out patches 23.5 dB, of interpolation 22.9 dB.
"""

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    config = ConfigDict()
    config.stage = "upsampler"  # the kind of model: a name of unclip_jax/stages/__init__.py
    config.dtype = "bfloat16"  # of matrix products and convolutions, or "float32"; all else is float32
    config.model = ConfigDict(
        dict(
            image_size=1024,  # side of its square pictures, pixels
            factor=4,  # of enlargement
            patch=256,  # side of the window trained on, pixels
            interpolation="bicubic",  # of the low-resolution input; or "bilinear", "antialiased_bicubic"
            round_low_res=True,  # to 8 bits, when it is the picture of the stage before
            last_step=False,  # a second network for the last step of sampling
            unet=dict(  # the ADM U-Net
                channels=192,  # of the first level; a multiple of norm_groups and head_channels
                channel_mult=(1, 1, 2, 2, 4, 4),  # times channels, level by level; each further one has half the side
                res_blocks=2,  # per level; one more on the way up
                norm_groups=32,  # groups of group normalisation
                scale_shift=True,  # the timestep scales and shifts what is normed; else it is added before
                resample_blocks=True,  # residual blocks halve and double the side; else convolutions do
                dropout=0.0,  # share of features dropped in training
                remat=False,  # activations are computed twice instead of kept: less memory, more time
            ),
        )
    )
    config.diffusion = ConfigDict(
        dict(
            schedule="linear",  # of noise: "cosine" or "linear"
            timesteps=1000,  # of the whole chain, which is trained
            predicts="eps",  # "eps": the noise; "x0": what it was added to
            learned_variance=True,  # the network gives the steps' variances too; else they are fixed
            snr_clip=(),  # (low, high): an x0 error counts clip(SNR, low, high) times; (): plain mean
            degradation="bsr",  # of the low-resolution input: "blur", or "bsr" (in the data pipeline, data/bsr.py)
            blur_probability=0.5,  # share of examples blurred, by "blur"
            blur_sigma=0.6,  # pixels of the low-resolution input; kernel of 3
        )
    )
    config.sampling = ConfigDict(
        dict(
            sampler="ddim",  # "ddpm", "ddim" or, in the diffusion prior, "analytic"
            steps="15",  # sampling steps: a number, numbers by section, "ddimN" or "fast27" (diffusion/schedule.py)
            eta=0.0,  # of ddim: 0 adds no noise, 1 as much as ddpm
            clip_x0=1.0,  # x0 is clipped to at most this magnitude; 0: no clipping
            temperature=1.0,  # times the noise that sampling starts from
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
            crop="dalle",  # random square crop and scale (arXiv 2102.12092); "center": none
            threads=16,  # that read and cut pictures, in each process
        )
    )
    config.optim = ConfigDict(
        dict(
            learning_rate=1.0e-4,  # after warm-up
            warmup_steps=0,  # in which it rises linearly; 0: none
            schedule="constant",  # "constant", or "cosine" or "linear" to zero at train.steps
            b1=0.9,  # Adam's, of the mean gradient
            b2=0.999,  # Adam's, of the mean square
            eps=1e-8,  # Adam's, beside the root of the mean square
            weight_decay=0.0,  # times the learning rate; of matrices and kernels, not of gains and biases
            clip_norm=0.0,  # largest norm of the whole gradient; 0: no clipping
            ema_decay=0.9999,  # of the parameters' moving average, per step
            accumulate=1,  # microbatches per step
        )
    )
    config.train = ConfigDict(
        dict(
            steps=1_000_000,  # of the whole run
            batch_size=512,  # examples in a step, over all devices
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
                    unet=dict(channels=64, channel_mult=(1, 2, 2, 4), dropout=0.0, remat=False),
                ),
                data=dict(source="tfds:emoji_scenes/pair_1024", crop="center"),
                optim=dict(warmup_steps=1000, ema_decay=0.999),
                train=dict(steps=50000, batch_size=32, sample_every=5000),
            )
        )
    elif size == "tiny":
        config.update(
            dict(
                dtype="float32",
                model=dict(
                    image_size=256,
                    patch=64,
                    unet=dict(
                        channels=16,
                        channel_mult=(1, 2),
                        res_blocks=1,
                        norm_groups=4,
                        dropout=0.0,
                        remat=False,
                    ),
                ),
                # BSR takes more steps to learn: so few leave specks on plain grounds.
                diffusion=dict(predicts="x0", learned_variance=False, snr_clip=(0.3, 5.0), degradation="blur"),
                sampling=dict(steps="4"),
                data=dict(source="tfds:emoji_scenes/single_256", crop="center", threads=2),
                optim=dict(
                    learning_rate=0.002,
                    warmup_steps=50,
                    schedule="cosine",
                    b2=0.99,
                    clip_norm=1.0,
                    ema_decay=0.99,
                ),
                train=dict(
                    steps=400,
                    batch_size=8,
                    checkpoint_every=500,
                    sample_every=100000,
                    keep=2,
                    eval_size=8,
                    expected_loss=((50, 0.06, 0.22), (200, 0.022, 0.08), (400, 0.008, 0.045)),
                ),
            )
        )
    elif size != "paper":
        raise ValueError(f"config size {size!r}: expected paper, small or tiny")
    return config
