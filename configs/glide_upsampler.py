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

from unclip_jax import config

PAPER = config.recipe(
    stage="glide", dtype="bfloat16", mesh=config.mesh(data=-1, fsdp=1),
    model=dict(
        **config.pictures(image_size=256),
        **config.enlargement(factor=4, interpolation="bicubic", round_low_res=True),
        **config.inpainting(inpaint=False),
        unet=config.attention_unet(channels=384, channel_mult=(1, 1, 2, 2, 4, 4), res_blocks=2, attention=(8, 16, 32),
                                   middle_attention=True, head_channels=64, heads=(0, 0), norm_groups=32,
                                   scale_shift=True, resample_blocks=True, dropout=0.0, remat=True),
        text=config.text(vocab_size=50257, context=256, width=1024, depth=16, heads=16),
    ),
    init=config.init(bundle="", model=False),
    diffusion=config.caption_diffusion(schedule="linear", timesteps=1000, predicts="eps", learned_variance=True,
                                       snr_clip=(), drop_caption=0.0),  # it is not guided
    sampling=config.sampling(sampler="ddim", steps="fast27", eta=0.0, clip_x0=1.0, temperature=0.997),
    data=config.caption_data(source="", data_dir="~/tensorflow_datasets", split="train", eval_split="test",
                             weights=(), image_feature="image", caption_feature="caption", tokenizer="",
                             min_side=256, max_aspect=0.0, crop="dalle", threads=16, workers=0),
    optim=config.adam(learning_rate=3e-4, warmup_steps=0, schedule="constant", b1=0.9, b2=0.999, eps=1e-8,
                      weight_decay=0.0, clip_norm=0.0, ema_decay=0.9999, accumulate=1, frozen=(), lora_rank=0),
    train=config.train(steps=1_600_000, batch_size=512, seed=0, log_every=50,
                       checkpoint_every=5000, checkpoint_minutes=30.0,
                       sample_every=10000, eval_size=1024, draw_size=64, measure=(), inception="", reference="",
                       keep=3, keep_every=0, max_skips=20, watchdog_minutes=60.0, expected_loss=()),
)

SMALL = dict(
    model=dict(unet=dict(channels=64, res_blocks=1, remat=False),
               text=dict(vocab_size=1024, context=32, width=256, depth=4, heads=4)),
    data=dict(source="tfds:emoji_scenes/pair_256", crop="center"),
    optim=dict(warmup_steps=1000, ema_decay=0.999),
    train=dict(steps=50000, batch_size=32, sample_every=5000),
)

TINY = dict(
    dtype="float32",
    model=dict(image_size=64,
               unet=dict(channels=24, channel_mult=(1, 2, 2), res_blocks=1, attention=(4,), head_channels=24,
                         norm_groups=8, remat=False),
               text=dict(vocab_size=512, context=24, width=64, depth=2, heads=2)),
    diffusion=dict(predicts="x0", learned_variance=False, snr_clip=(0.3, 5.0)),
    sampling=dict(steps="8"),
    data=dict(source="tfds:emoji_scenes/single_64", min_side=64, crop="center", threads=2),
    optim=dict(learning_rate=0.002, warmup_steps=50, schedule="cosine", b2=0.99, clip_norm=1.0, ema_decay=0.99),
    train=dict(steps=300, batch_size=8, checkpoint_every=300, sample_every=100000, keep=2),
)


def get_config(size: str = "paper") -> config.ConfigDict:
    return config.sized(size, PAPER, small=SMALL, tiny=TINY)
