"""The autoregressive prior: caption and CLIP text embedding → CLIP image embedding, as quantised PCA components.

    python -m unclip_jax.train --config=configs/prior_ar.py:tiny --workdir=runs/prior_ar \\
        --config.clip.bundle=runs/clip/bundle

paper  A text encoder of 24 layers of width 2048 and 24 layers of width 1664 over 319 codes (unCLIP, appendix C,
       table 3). The bounds of a code's buckets, the buckets of the dot product, the vocabulary and the guidance are
       not published.
small  Emoji scenes of two objects, for one GPU.
tiny   Emoji scenes of one object, for two CPU cores; trains its CLIP first if none is named. Took 7 minutes
       on cores that were busy with other work; cosine to the true embedding 0.85 on held-out captions, where the codes
       of the true embeddings themselves keep 0.99.
shipped  The autoregressive prior of experiments/. Two runs of this config, the second on from the first
       (experiments/weights/make.py --onward), take about as long as the diffusion prior's did.
"""

from unclip_jax import config

PAPER = config.recipe(
    stage="prior_ar", dtype="bfloat16", mesh=config.mesh(data=-1, fsdp=1),
    model=dict(
        **config.embedding(embedding_dim=1024),
        num_codes=319,  # Principal components of an embedding that are kept, each a code; at most embedding_dim.
        num_buckets=1024,  # Buckets of each component; a code says which one.
        num_dot_buckets=64,  # Buckets of the dot product of image and text embedding.
        context=384,  # Rows of the table of positions, for the codes and for what is told before them.
        **config.transformer(width=1664, depth=24, heads=26),
        text=config.text(vocab_size=50257, context=256, width=2048, depth=24, heads=32),
        **config.memory(remat=True),
    ),
    prior=dict(  # Codes of embeddings, and what the prior is not told.
        batches=32,  # Batches of training in which components and buckets are found, before the first step.
        outside=1e-4,  # Share of their embeddings beyond each end of a component's buckets, from 0 to 0.4.
        drop_text=0.1,  # Share of training examples without caption and text embedding, from 0 to 1; for guidance.
    ),
    sampling=dict(
        guidance_scale=1.0,  # Scale of the guidance of the codes' logits: 1, none; more, nearer the caption.
        temperature=1.0,  # Temperature of the codes' logits; 0: the likeliest code each time.
        dot_percentile=50.0,  # Percentile of the dot products in training, from 0 to 100, above which one is drawn.
    ),
    init=config.init(bundle="", model=False),
    clip=config.clip(bundle="", config=""),
    data=config.embedding_data(source="", data_dir="~/tensorflow_datasets", split="train", eval_split="test",
                               weights=(), image_feature="image", caption_feature="caption",
                               tokenizer="", embeddings="",
                               min_side=0, max_aspect=0.0, crop="dalle", threads=16, workers=0),
    optim=config.adam(learning_rate=1.6e-4, warmup_steps=1000, schedule="constant", b1=0.9, b2=0.91, eps=1e-10,
                      weight_decay=4e-2, clip_norm=1.0, ema_decay=0.999, accumulate=1, frozen=(), lora_rank=0),
    train=config.train(steps=1_000_000, batch_size=4096, seed=0, log_every=50,
                       checkpoint_every=5000, checkpoint_minutes=30.0,
                       sample_every=10000, eval_size=1024, draw_size=64, measure=(), inception="", reference="",
                       keep=3, keep_every=0, max_skips=20, watchdog_minutes=60.0, expected_loss=()),
)

SMALL = dict(
    model=dict(embedding_dim=512, num_codes=128, num_buckets=256, context=130, width=512, depth=8, heads=8,
               text=dict(vocab_size=1024, context=32, width=512, depth=6, heads=8), remat=False),
    data=dict(source="tfds:emoji_scenes/pair_256", crop="center"),
    optim=dict(learning_rate=0.0003, ema_decay=0.999),
    train=dict(steps=20000, batch_size=512, checkpoint_every=1000, sample_every=2000),
)

TINY = dict(
    dtype="float32",
    model=dict(embedding_dim=64, num_codes=24, num_buckets=64, num_dot_buckets=16, context=26, width=128, depth=4,
               heads=2, text=dict(vocab_size=512, context=24, width=128, depth=2, heads=2), remat=False),
    clip=dict(config="configs/clip.py:tiny"),
    data=dict(source="tfds:emoji_scenes/single_64", crop="center", threads=2),
    optim=dict(learning_rate=0.001, warmup_steps=50, schedule="cosine", weight_decay=0.01, b2=0.99, ema_decay=0.99),
    train=dict(steps=300, batch_size=128, checkpoint_every=500, sample_every=100000, keep=2,
               expected_loss=((50, 2.5, 5.3), (150, 2.1, 4.4), (300, 1.9, 4.0))),
)

SHIPPED = dict(
    dtype="float32",
    model=dict(embedding_dim=128, num_codes=48, num_buckets=128, num_dot_buckets=16, context=50, width=128, depth=4,
               heads=2, text=dict(vocab_size=1024, context=36, width=128, depth=2, heads=2), remat=False),
    clip=dict(config="configs/clip.py:shipped"),
    data=dict(source="tfds:emoji_scenes/varied_64 + tfds:emoji_scenes/single_64", weights=(2.0, 1.0), crop="center",
              threads=2),
    optim=dict(learning_rate=0.001, warmup_steps=200, schedule="cosine", weight_decay=0.01, b2=0.99, ema_decay=0.995),
    train=dict(steps=2400, batch_size=256, checkpoint_every=500, sample_every=2000, eval_size=512, keep=2),
)


def get_config(size: str = "paper") -> config.ConfigDict:
    return config.sized(size, PAPER, small=SMALL, tiny=TINY, shipped=SHIPPED)
