"""The first upsampler: 64 → 256 px (tiny: 16 → 64 px). Convolutions only, trained on patches.

    python -m unclip_jax.train --config=configs/upsampler_256.py:tiny --workdir=runs/upsampler_256

paper  320 channels, 729,710,726 parameters (unCLIP, appendix C, table 3; the spacing of its 27 steps is GLIDE's).
small  Emoji scenes of two objects, for one GPU.
tiny   Emoji scenes of one object, for two CPU cores: 144 s.
       PSNR of held-out patches 14.6 dB, of interpolation 15.2 dB: it draws edges, not means.
shipped  The first upsampler of the cascade of experiments/: 32 → 128 px.
"""

from unclip_jax import config

PAPER = config.recipe(
    stage="upsampler", dtype="bfloat16", mesh=config.mesh(data=-1, fsdp=1),
    model=dict(
        **config.pictures(image_size=256),
        **config.enlargement(factor=4, interpolation="bicubic", round_low_res=True),
        **config.reader(caption="none"),
        **config.upsampler(patch=64, last_step=False),
        unet=config.attention_unet(channels=320, channel_mult=(1, 2, 3, 4), res_blocks=3, attention=(),
                                   middle_attention=False, head_channels=64, heads=(0, 0), norm_groups=32,
                                   scale_shift=True, resample_blocks=True, dropout=0.1, remat=False),
        text=config.text(vocab_size=50257, context=256, width=1024, depth=16, heads=16),  # GLIDE's upsampler's
    ),
    init=config.init(bundle="", model=False),
    diffusion=config.upsampler_diffusion(schedule="cosine", timesteps=1000, predicts="eps", learned_variance=True,
                                         snr_clip=(), drop_caption=0.0, degradation="blur", blur_probability=0.5,
                                         blur_sigma=0.6),
    sampling=config.guided_sampling(sampler="ddim", steps="fast27", eta=0.0, clip_x0=1.0, temperature=1.0,
                                    guidance_scale=1.0),
    data=config.caption_data(source="", data_dir="~/tensorflow_datasets", split="train", eval_split="test",
                             weights=(), image_feature="image", caption_feature="caption", tokenizer="",
                             min_side=256, max_aspect=0.0, crop="dalle", threads=16, workers=0),
    optim=config.adam(learning_rate=1.2e-4, warmup_steps=0, schedule="constant", b1=0.9, b2=0.999, eps=1e-8,
                      weight_decay=0.0, clip_norm=0.0, ema_decay=0.9999, accumulate=1, frozen=(), lora_rank=0),
    train=config.train(steps=1_000_000, batch_size=1024, seed=0, log_every=50,
                       checkpoint_every=5000, checkpoint_minutes=30.0,
                       sample_every=10000, eval_size=1024, draw_size=64, measure=(), inception="", reference="",
                       keep=3, keep_every=0, max_skips=20, watchdog_minutes=60.0, expected_loss=()),
)

SMALL = dict(
    model=dict(unet=dict(channels=128, res_blocks=2, dropout=0.0),
               text=dict(vocab_size=1024, context=32, width=256, depth=4, heads=4)),
    data=dict(source="tfds:emoji_scenes/pair_256", crop="center"),
    optim=dict(warmup_steps=1000, ema_decay=0.999),
    train=dict(steps=50000, batch_size=64, sample_every=5000),
)

TINY = dict(
    dtype="float32",
    model=dict(image_size=64, patch=32,
               unet=dict(channels=32, channel_mult=(1, 2), res_blocks=1, head_channels=32, norm_groups=8, dropout=0.0),
               text=dict(vocab_size=512, context=24, width=64, depth=2, heads=2)),
    diffusion=dict(predicts="x0", learned_variance=False, snr_clip=(0.3, 5.0)),
    sampling=dict(steps="8"),
    data=dict(source="tfds:emoji_scenes/single_64", min_side=64, crop="center", threads=2),
    optim=dict(learning_rate=0.002, warmup_steps=50, schedule="cosine", b2=0.99, clip_norm=1.0, ema_decay=0.99),
    train=dict(steps=600, batch_size=8, checkpoint_every=500, sample_every=100000, keep=2,
               expected_loss=((100, 0.05, 0.2), (300, 0.02, 0.065), (600, 0.012, 0.045))),
)

SHIPPED = dict(
    dtype="float32",
    model=dict(image_size=128, patch=64, unet=TINY["model"]["unet"],
               text=dict(vocab_size=1024, context=36, width=64, depth=2, heads=2)),
    diffusion=TINY["diffusion"],
    sampling=dict(steps="8"),
    data=dict(source="tfds:emoji_scenes/varied_256 + tfds:emoji_scenes/single_256", weights=(3.0, 1.0), min_side=128,
              crop="center", threads=2),
    optim=dict(learning_rate=0.002, warmup_steps=50, schedule="cosine", b2=0.99, clip_norm=1.0, ema_decay=0.995),
    train=dict(steps=3000, batch_size=8, checkpoint_every=500, sample_every=1000, keep=2, eval_size=64),
)


def get_config(size: str = "paper") -> config.ConfigDict:
    return config.sized(size, PAPER, small=SMALL, tiny=TINY, shipped=SHIPPED)
