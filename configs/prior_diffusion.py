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
    config.stage = "prior_diffusion"  # the kind of model: a name of unclip_jax/stages/__init__.py
    config.dtype = "bfloat16"  # of matrix products and convolutions, or "float32"; all else is float32
    config.model = ConfigDict(
        dict(
            embedding_dim=1024,  # numbers of CLIP's embeddings
            caption="own",  # read in tokens of its own; "clip": as CLIP's text tower does
            vocab_size=50257,  # pieces that its tokenizer may have
            context=256,  # tokens of a caption; longer ones are cut
            width=2048,  # channels; a multiple of heads
            depth=24,  # blocks
            heads=32,  # of attention, in each block
            remat=True,  # activations are computed twice instead of kept: less memory, more time
        )
    )
    config.diffusion = ConfigDict(
        dict(
            schedule="cosine",  # of noise: "cosine" or "linear"
            timesteps=1000,  # of the whole chain, which is trained
            predicts="x0",  # "eps": the noise; "x0": what it was added to
            learned_variance=False,  # the network gives the steps' variances too; else they are fixed
            snr_clip=(),  # (low, high): an x0 error counts clip(SNR, low, high) times; (): plain mean
            embedding_scale=17.2,  # unit vectors of 1024 numbers get the variance of pixels; 0.5375 √dim elsewhere
            whiten=False,  # embeddings are whitened, by a mean and std that come with the weights
            drop_text=0.1,  # share of examples without caption and text embedding, for guidance
        )
    )
    config.sampling = ConfigDict(
        dict(
            sampler="analytic",  # "ddpm", "ddim" or, in the diffusion prior, "analytic"
            steps="64",  # sampling steps: a number, numbers by section, "ddimN" or "fast27" (diffusion/schedule.py)
            eta=0.0,  # of ddim: 0 adds no noise, 1 as much as ddpm
            guidance_scale=1.0,  # 1: none; more: nearer the caption
            clip_x0=0.0,  # x0 is clipped to at most this magnitude; 0: no clipping
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
            learning_rate=1.1e-4,  # after warm-up
            warmup_steps=1000,  # in which it rises linearly; 0: none
            schedule="constant",  # "constant", or "cosine" or "linear" to zero at train.steps
            b1=0.9,  # Adam's, of the mean gradient
            b2=0.96,  # Adam's, of the mean square
            eps=1e-6,  # Adam's, beside the root of the mean square
            weight_decay=6e-2,  # times the learning rate; of matrices and kernels, not of gains and biases
            clip_norm=1.0,  # largest norm of the whole gradient; 0: no clipping
            ema_decay=0.9999,  # of the parameters' moving average, per step
            accumulate=1,  # microbatches per step
        )
    )
    config.train = ConfigDict(
        dict(
            steps=600_000,  # of the whole run
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
                train=dict(
                    steps=260,
                    batch_size=128,
                    checkpoint_every=500,
                    sample_every=100000,
                    keep=2,
                    expected_loss=((50, 0.036, 0.1), (150, 0.022, 0.056), (260, 0.015, 0.045)),
                ),
            )
        )
    elif size != "paper":
        raise ValueError(f"config size {size!r}: expected paper, small or tiny")
    return config
