"""The second upsampler: 256 → 1024 px (tiny: 64 → 256 px). Convolutions only, trained on patches.

    python -m unclip_jax.train --config=configs/upsampler_1024.py:tiny --workdir=runs/upsampler_1024

paper  192 channels, 282,064,326 parameters (unCLIP, appendix C, table 3). Its input is corrupted by BSR degradation,
       made on the host (data/bsr.py).
small  Emoji scenes of two objects, for one GPU; BSR as well.
tiny   Emoji scenes of one object, for two CPU cores: 143 s. Its input is blurred, as the first upsampler's is.
       PSNR of held-out patches 23.5 dB, of interpolation 22.9 dB.
shipped  The second upsampler of the cascade of experiments/: 128 → 512 px.
"""

from unclip_jax import config

PAPER = config.recipe(
    stage="upsampler", dtype="bfloat16", mesh=config.mesh(data=-1, fsdp=1),
    model=dict(
        **config.pictures(image_size=1024),
        **config.enlargement(factor=4, interpolation="bicubic", round_low_res=True),
        **config.reader(caption="none"),
        **config.upsampler(patch=256, last_step=False),
        unet=config.attention_unet(channels=192, channel_mult=(1, 1, 2, 2, 4, 4), res_blocks=2, attention=(),
                                   middle_attention=False, head_channels=64, heads=(0, 0), norm_groups=32,
                                   scale_shift=True, resample_blocks=True, dropout=0.0, remat=False),
        text=config.text(vocab_size=50257, context=256, width=1024, depth=16, heads=16),  # GLIDE's upsampler's
    ),
    init=config.init(bundle="", model=False),
    diffusion=config.upsampler_diffusion(schedule="linear", timesteps=1000, predicts="eps", learned_variance=True,
                                         snr_clip=(), drop_caption=0.0, degradation="bsr", blur_probability=0.5,
                                         blur_sigma=0.6),
    sampling=config.guided_sampling(sampler="ddim", steps="15", eta=0.0, clip_x0=1.0, temperature=1.0,
                                    guidance_scale=1.0),
    data=config.caption_data(source="", data_dir="~/tensorflow_datasets", split="train", eval_split="test",
                             weights=(), image_feature="image", caption_feature="caption", tokenizer="",
                             min_side=1024, max_aspect=0.0, crop="dalle", threads=16, workers=0),
    optim=config.adam(learning_rate=1.0e-4, warmup_steps=0, schedule="constant", b1=0.9, b2=0.999, eps=1e-8,
                      weight_decay=0.0, clip_norm=0.0, ema_decay=0.9999, accumulate=1, frozen=(), lora_rank=0),
    train=config.train(steps=1_000_000, batch_size=512, seed=0, log_every=50,
                       checkpoint_every=5000, checkpoint_minutes=30.0,
                       sample_every=10000, eval_size=1024, draw_size=64, measure=(), inception="", reference="",
                       keep=3, keep_every=0, max_skips=20, watchdog_minutes=60.0, expected_loss=()),
)

SMALL = dict(
    model=dict(unet=dict(channels=64, channel_mult=(1, 2, 2, 4)),
               text=dict(vocab_size=1024, context=32, width=256, depth=4, heads=4)),
    data=dict(source="tfds:emoji_scenes/pair_1024", crop="center"),
    optim=dict(warmup_steps=1000, ema_decay=0.999),
    train=dict(steps=50000, batch_size=32, sample_every=5000),
)

TINY = dict(
    dtype="float32",
    model=dict(image_size=256, patch=64,
               unet=dict(channels=16, channel_mult=(1, 2), res_blocks=1, head_channels=16, norm_groups=4),
               text=dict(vocab_size=512, context=24, width=64, depth=2, heads=2)),
    # BSR takes more steps to learn: after so few it leaves specks on plain grounds.
    diffusion=dict(predicts="x0", learned_variance=False, snr_clip=(0.3, 5.0), degradation="blur"),
    sampling=dict(steps="4"),
    data=dict(source="tfds:emoji_scenes/single_256", min_side=256, crop="center", threads=2),
    optim=dict(learning_rate=0.002, warmup_steps=50, schedule="cosine", b2=0.99, clip_norm=1.0, ema_decay=0.99),
    train=dict(steps=400, batch_size=8, checkpoint_every=500, sample_every=100000, keep=2, eval_size=8, draw_size=8,
               expected_loss=((50, 0.06, 0.22), (200, 0.022, 0.08), (400, 0.008, 0.045))),
)

SHIPPED = dict(
    dtype="float32",
    model=dict(image_size=512, patch=128, unet=TINY["model"]["unet"],
               text=dict(vocab_size=1024, context=36, width=64, depth=2, heads=2)),
    diffusion=TINY["diffusion"],
    sampling=dict(steps="4"),
    data=dict(source="tfds:emoji_scenes/single_1024", min_side=512, crop="center", threads=2),
    optim=dict(learning_rate=0.002, warmup_steps=50, schedule="cosine", b2=0.99, clip_norm=1.0, ema_decay=0.99),
    train=dict(steps=1000, batch_size=8, checkpoint_every=500, sample_every=500, keep=2, eval_size=8, draw_size=8),
)


def get_config(size: str = "paper") -> config.ConfigDict:
    return config.sized(size, PAPER, small=SMALL, tiny=TINY, shipped=SHIPPED)
