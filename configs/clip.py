"""CLIP: pictures and captions into one space, in which the prior and the decoder live.

    python -m unclip_jax.train --config=configs/clip.py:tiny --workdir=runs/clip

paper  ViT-H/16 at 256 px and a causal text tower of 24 layers, 986,339,841 parameters (unCLIP, appendix C; batch,
       weight decay, warm-up and Adam's numbers from the CLIP paper). For a TPU slice, with a dataset of your own.
small  Emoji scenes of two objects, for one GPU.
tiny   Emoji scenes of one object, for two CPU cores: 108 s; then 100% of
       64 held-out pictures and captions find each other.
shipped  The CLIP of the cascade of experiments/, which is to ship with this package: emoji scenes, varied and of
       one object, at 32 px. Takes 36 minutes of one CPU core; then 89% of 512 held-out pictures and captions find each
       other.
"""

from unclip_jax import config

PAPER = config.recipe(
    stage="clip", dtype="bfloat16", mesh=config.mesh(data=-1, fsdp=1),
    model=dict(
        **config.pictures(image_size=256),
        **config.clip_model(dim=1024, activation="quick_gelu", initial_scale=1 / 0.07, max_scale=100.0,
                            # Colours as the public CLIP's.
                            mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
                            resize="area", unit_norm=True, remat=True),
        image=config.image(patch=16, width=1280, depth=32, heads=20, timesteps=0),
        text=config.text(vocab_size=49408, context=77, width=1024, depth=24, heads=16),
    ),
    init=config.init(bundle="", model=False),
    data=config.caption_data(source="", data_dir="~/tensorflow_datasets", split="train", eval_split="test",
                             weights=(), image_feature="image", caption_feature="caption", tokenizer="",
                             min_side=0, max_aspect=0.0, crop="dalle", threads=16, workers=0),
    optim=config.sam_adam(learning_rate=3e-4, warmup_steps=2000, schedule="cosine", b1=0.9, b2=0.98, eps=1e-6,
                          weight_decay=0.2, clip_norm=0.0, ema_decay=0.9999, accumulate=1, frozen=(), lora_rank=0,
                          sam_rho=0.1, sam_rows=64),
    train=config.train(steps=650_000, batch_size=32768, seed=0, log_every=50,
                       checkpoint_every=5000, checkpoint_minutes=30.0,
                       sample_every=10000, eval_size=1024, draw_size=64, measure=(), inception="", reference="",
                       keep=3, keep_every=0, max_skips=20, watchdog_minutes=60.0, expected_loss=()),
)

SMALL = dict(
    model=dict(image_size=64, dim=512, image=dict(patch=8, width=512, depth=8, heads=8),
               text=dict(vocab_size=1024, context=32, width=512, depth=6, heads=8), remat=False),
    data=dict(source="tfds:emoji_scenes/pair_256", crop="center"),
    optim=dict(warmup_steps=500, weight_decay=0.1, ema_decay=0.999, sam_rho=0.0),
    train=dict(steps=10000, batch_size=1024, checkpoint_every=1000, sample_every=1000),
)

TINY = dict(
    dtype="float32",
    model=dict(image_size=32, dim=64, image=dict(patch=8, width=128, depth=4, heads=2),
               text=dict(vocab_size=512, context=24, width=128, depth=3, heads=2), remat=False),
    data=dict(source="tfds:emoji_scenes/single_64", crop="center", threads=2),
    optim=dict(learning_rate=0.001, warmup_steps=50, weight_decay=0.05, clip_norm=1.0, ema_decay=0.98, sam_rho=0.0),
    train=dict(steps=260, batch_size=128, checkpoint_every=500, sample_every=100000, keep=2,
               expected_loss=((100, 0.25, 0.8), (150, 0.13, 0.4), (260, 0.13, 0.4))),
)

SHIPPED = dict(
    dtype="float32",
    model=dict(image_size=32, dim=128, image=dict(patch=8, width=128, depth=4, heads=2),
               text=dict(vocab_size=1024, context=36, width=128, depth=3, heads=2), remat=False),
    data=dict(source="tfds:emoji_scenes/varied_64 + tfds:emoji_scenes/single_64", weights=(3.0, 1.0), crop="center",
              threads=2),
    optim=dict(learning_rate=0.001, warmup_steps=200, weight_decay=0.05, clip_norm=1.0, ema_decay=0.995, sam_rho=0.0),
    train=dict(steps=1200, batch_size=256, checkpoint_every=500, sample_every=1000, eval_size=512, keep=2),
)


def get_config(size: str = "paper") -> config.ConfigDict:
    return config.sized(size, PAPER, small=SMALL, tiny=TINY, shipped=SHIPPED)
