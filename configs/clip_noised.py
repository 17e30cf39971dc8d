"""The noised CLIP: sees pictures diffused to any timestep, to guide a diffusion model (GLIDE, section 2.4).

    python -m unclip_jax.train --config=configs/clip_noised.py:tiny --workdir=runs/clip_noised

paper  ViT-L with patches of 4 pixels at 64 px (batch, steps and weight decay from GLIDE; learning rate, warm-up and
       Adam's numbers from the CLIP paper). For a TPU slice, with a dataset of your own.
small  Emoji scenes of two objects at 64 px, for one GPU.
tiny   Emoji scenes of one object at 16 px, what the tiny decoder draws, for two CPU cores. Took 11 minutes
       on cores that were busy with other work; then, among 64 held-out pictures and captions, finds its own in 93 %
       without noise, 85, 73 and 34 % at a quarter, half and three quarters of the timesteps, 2 % (chance) at the last.
shipped  The noised CLIP that comes with this package, for its GLIDE and decoder at 32 px. It goes on from the clean
       CLIP, whose network it has (experiments/weights/make.py).
"""

from unclip_jax import config

PAPER = config.recipe(
    stage="clip", dtype="bfloat16", mesh=config.mesh(data=-1, fsdp=1),
    model=dict(
        **config.pictures(image_size=64),
        **config.clip_model(dim=768, activation="gelu", initial_scale=1 / 0.07, max_scale=100.0,
                            # Colours as the public CLIP's.
                            mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
                            resize="area", unit_norm=True, remat=True),
        image=config.image(patch=4, width=1024, depth=24, heads=16, timesteps=1000),
        text=config.text(vocab_size=49408, context=77, width=768, depth=12, heads=12),
        noise_schedule="cosine",  # Noise schedule of the diffusion model that is guided: "cosine" or "linear".
    ),
    init=config.init(bundle="", model=False),
    data=config.caption_data(source="", data_dir="~/tensorflow_datasets", split="train", eval_split="test",
                             weights=(), image_feature="image", caption_feature="caption", tokenizer="",
                             min_side=0, max_aspect=0.0, crop="dalle", threads=16, workers=0),
    optim=config.sam_adam(learning_rate=4e-4, warmup_steps=2000, schedule="cosine", b1=0.9, b2=0.98, eps=1e-6,
                          weight_decay=0.0125, clip_norm=0.0, ema_decay=0.9999, accumulate=1, frozen=(), lora_rank=0,
                          sam_rho=0.0, sam_rows=64),
    train=config.train(steps=390_000, batch_size=32768, seed=0, log_every=50,
                       checkpoint_every=5000, checkpoint_minutes=30.0,
                       sample_every=10000, eval_size=1024, draw_size=64, measure=(), inception="", reference="",
                       keep=3, keep_every=0, max_skips=20, watchdog_minutes=60.0, expected_loss=()),
)

SMALL = dict(
    model=dict(dim=512, image=dict(patch=4, width=512, depth=8, heads=8),
               text=dict(vocab_size=1024, context=32, width=512, depth=6, heads=8), remat=False),
    data=dict(source="tfds:emoji_scenes/pair_256", crop="center"),
    optim=dict(warmup_steps=500, weight_decay=0.1, ema_decay=0.999),
    train=dict(steps=10000, batch_size=1024, checkpoint_every=1000, sample_every=1000),
)

TINY = dict(
    dtype="float32",
    model=dict(image_size=16, dim=64, image=dict(patch=4, width=128, depth=4, heads=2),
               text=dict(vocab_size=512, context=24, width=128, depth=3, heads=2), remat=False),
    data=dict(source="tfds:emoji_scenes/single_64", crop="center", threads=2),
    optim=dict(learning_rate=0.001, warmup_steps=50, weight_decay=0.05, clip_norm=1.0, ema_decay=0.98),
    train=dict(steps=600, batch_size=128, checkpoint_every=500, sample_every=100000, keep=2,
               expected_loss=((100, 2.0, 4.3), (300, 1.4, 3.1), (600, 1.2, 2.9))),
)

SHIPPED = dict(
    dtype="float32",
    model=dict(image_size=32, dim=128, activation="quick_gelu", image=dict(patch=8, width=128, depth=4, heads=2),
               text=dict(vocab_size=1024, context=36, width=128, depth=3, heads=2), remat=False),
    data=dict(source="tfds:emoji_scenes/varied_64 + tfds:emoji_scenes/single_64", weights=(3.0, 1.0), crop="center",
              threads=2),
    optim=dict(learning_rate=0.0005, warmup_steps=50, weight_decay=0.05, clip_norm=1.0, ema_decay=0.995),
    train=dict(steps=600, batch_size=256, checkpoint_every=500, sample_every=1000, eval_size=512, keep=2),
)


def get_config(size: str = "paper") -> config.ConfigDict:
    return config.sized(size, PAPER, small=SMALL, tiny=TINY, shipped=SHIPPED)
