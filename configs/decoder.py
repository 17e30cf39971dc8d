"""The decoder: CLIP image embedding and caption → 64 px picture (tiny: 16 px).

    python -m unclip_jax.train --config=configs/decoder.py:tiny --workdir=runs/decoder \\
        --config.clip.bundle=runs/clip/bundle

paper  512 channels and a text path of 24 layers of width 2048, 3,565,434,374 parameters (unCLIP, appendix C, table 3;
       the topology is ADM's). For a TPU slice, with a dataset of your own.
small  Emoji scenes of two objects, for one GPU.
tiny   Emoji scenes of one object, for two CPU cores; trains its CLIP first if none is named. It predicts x0, which
       learns faster in a short run than the papers' eps with a learned variance. Takes 347 s.
       Given true embeddings of 64 held-out scenes, object right in 92%, background in 100%.
"""

from ml_collections import ConfigDict


def get_config(size: str = "paper") -> ConfigDict:
    config = ConfigDict()
    config.stage = "decoder"  # the kind of model: a name of unclip_jax/stages/__init__.py
    config.dtype = "bfloat16"  # of matrix products and convolutions, or "float32"; all else is float32
    config.model = ConfigDict(
        dict(
            image_size=64,  # side of its square pictures, pixels
            embedding_dim=1024,  # numbers of CLIP's embeddings
            image_tokens=4,  # context tokens made of the CLIP embedding
            caption="own",  # read in tokens of its own; "clip": as CLIP's text tower does
            learned_null=False,  # a dropped embedding is a learned vector; else zeros
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
                remat=False,  # activations are computed twice instead of kept: less memory, more time
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
    config.diffusion = ConfigDict(
        dict(
            schedule="cosine",  # of noise: "cosine" or "linear"
            timesteps=1000,  # of the whole chain, which is trained
            predicts="eps",  # "eps": the noise; "x0": what it was added to
            learned_variance=True,  # the network gives the steps' variances too; else they are fixed
            snr_clip=(),  # (low, high): an x0 error counts clip(SNR, low, high) times; (): plain mean
            drop_embedding=0.1,  # share of examples without the CLIP embedding, for guidance
            drop_caption=0.5,  # share of examples without the caption, for guidance
        )
    )
    config.sampling = ConfigDict(
        dict(
            sampler="ddpm",  # "ddpm", "ddim" or, in the diffusion prior, "analytic"
            steps="250",  # sampling steps: a number, numbers by section, "ddimN" or "fast27" (diffusion/schedule.py)
            eta=0.0,  # of ddim: 0 adds no noise, 1 as much as ddpm
            # the paper's for its FID table
            guidance_scale=1.25,  # 1: none; more: nearer the caption
            clip_x0=1.0,  # x0 is clipped to at most this magnitude; 0: no clipping
            temperature=1.0,  # times the noise that sampling starts from
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
            learning_rate=1.2e-4,  # after warm-up
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
            steps=800_000,  # of the whole run
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
                    embedding_dim=512,
                    learned_null=True,
                    unet=dict(channels=128, res_blocks=2, remat=False),
                    text=dict(vocab_size=1024, context=32, width=512, depth=6, heads=8),
                ),
                sampling=dict(guidance_scale=2.0),
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
                    embedding_dim=64,
                    learned_null=True,
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
                diffusion=dict(predicts="x0", learned_variance=False, snr_clip=(0.3, 5.0)),
                sampling=dict(sampler="ddim", steps="25", guidance_scale=1.5),
                clip=dict(config="configs/clip.py:tiny"),
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
                    steps=1300,
                    batch_size=32,
                    checkpoint_every=400,
                    sample_every=100000,
                    keep=2,
                    expected_loss=((100, 0.065, 0.17), (600, 0.03, 0.08), (1300, 0.012, 0.045)),
                ),
            )
        )
    elif size != "paper":
        raise ValueError(f"config size {size!r}: expected paper, small or tiny")
    return config
