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
       papers' eps with a learned variance. Took 27 minutes on cores that were half busy with other work; for the first
       half it draws objects at random, and in the end the right one for 63 of 64 held-out captions.
"""

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    config = ConfigDict()
    config.stage = "glide"  # the kind of model: a name of unclip_jax/stages/__init__.py
    config.dtype = "bfloat16"  # of matrix products and convolutions, or "float32"; all else is float32
    config.model = ConfigDict(
        dict(
            image_size=64,  # side of its square pictures, pixels
            factor=0,  # of enlargement; 0: nothing is enlarged
            inpaint=False,  # takes known pixels in, to fill in the others
            unet=dict(  # the ADM U-Net
                channels=512,  # of the first level; a multiple of norm_groups and head_channels
                channel_mult=(1, 2, 3, 4),  # times channels, level by level; each further one has half the side
                res_blocks=3,  # per level; one more on the way up
                attention=(2, 4, 8),  # downsampling factors: 32, 16 and 8 pixels
                middle_attention=True,  # attention between the way down and the way up too
                head_channels=64,  # channels of an attention head; 0: heads tells
                heads=(0, 0),  # where head_channels is 0: their number, on the way down and up
                norm_groups=32,  # groups of group normalisation
                scale_shift=True,  # the timestep scales and shifts what is normed; else it is added before
                resample_blocks=True,  # residual blocks halve and double the side; else convolutions do
                dropout=0.1,  # share of features dropped in training
                remat=True,  # activations are computed twice instead of kept: less memory, more time
            ),
            text=dict(  # the transformer that reads captions
                vocab_size=50257,  # pieces that its tokenizer may have
                context=256,  # tokens of a caption; longer ones are cut
                width=2048,  # channels; a multiple of heads
                depth=24,  # blocks
                heads=32,  # of attention, in each block
            ),
        )
    )
    config.init = ConfigDict(
        dict(
            bundle="",  # a trained bundle to start from; "": from scratch
        )
    )
    config.diffusion = ConfigDict(
        dict(
            schedule="cosine",  # of noise: "cosine" or "linear"
            timesteps=1000,  # of the whole chain, which is trained
            predicts="eps",  # "eps": the noise; "x0": what it was added to
            learned_variance=True,  # the network gives the steps' variances too; else they are fixed
            snr_clip=(),  # (low, high): an x0 error counts clip(SNR, low, high) times; (): plain mean
            # 0.2 in fine-tuning
            drop_caption=0.0,  # share of examples without the caption, for guidance
        )
    )
    config.sampling = ConfigDict(
        dict(
            sampler="ddpm",  # "ddpm", "ddim" or, in the diffusion prior, "analytic"
            steps="150",  # sampling steps: a number, numbers by section, "ddimN" or "fast27" (diffusion/schedule.py)
            eta=0.0,  # of ddim: 0 adds no noise, 1 as much as ddpm
            # once fine-tuned for it
            guidance_scale=3.0,  # 1: none; more: nearer the caption
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
            tokenizer="",  # a sentencepiece model; "": one is trained on the captions
            crop="dalle",  # random square crop and scale (arXiv 2102.12092); "center": none
            threads=16,  # that read and cut pictures, in each process
        )
    )
    config.optim = ConfigDict(
        dict(
            learning_rate=3e-4,  # after warm-up
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
            steps=2_500_000,  # of the whole run
            batch_size=2048,  # examples in a step, over all devices
            seed=0,  # of parameters, order of the data and noise
            log_every=50,  # steps between lines of metrics
            checkpoint_every=4000,  # steps between checkpoints
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
                train=dict(
                    steps=5000,
                    batch_size=32,
                    checkpoint_every=400,
                    sample_every=100000,
                    keep=2,
                    expected_loss=(
                        (200, 0.09, 0.23),
                        (1000, 0.06, 0.14),
                        (2500, 0.04, 0.12),
                        (3200, 0.022, 0.09),
                        (5000, 0.018, 0.06),
                    ),
                ),
            )
        )
    elif size != "paper":
        raise ValueError(f"config size {size!r}: expected paper, small or tiny")
    return config
