"""The diffusion prior: caption and CLIP text embedding → CLIP image embedding.

    python -m unclip_jax.train --config=configs/prior_diffusion.py:tiny --workdir=runs/prior \\
        --config.clip.bundle=runs/clip/bundle

paper  24 layers of width 2048, 1,326,752,768 parameters (unCLIP, appendix C, table 3). The vocabulary and prior
       guidance are not published. The variances of its 64 steps are estimated after training.
small  Emoji scenes of two objects, for one GPU.
tiny   Emoji scenes of one object, for two CPU cores; trains its CLIP first if none is named: 133 s;
       cosine to the true embedding 0.94 on held-out captions (another caption's: 0.01).
shipped  The prior of the cascade that comes with this package. A run takes 76 minutes of a CPU core, 17 of them for the
       analytic variances; the weights are of three, each on from the one before.
"""

from unclip_jax import config

PAPER = config.recipe(
    stage="prior_diffusion", dtype="bfloat16", mesh=config.mesh(data=-1, fsdp=1),
    model=dict(
        **config.embedding(embedding_dim=1024),
        **config.reader(caption="own"),
        **config.text(vocab_size=50257, context=256, width=2048, depth=24, heads=32),
        **config.memory(remat=True),
    ),
    diffusion=dict(
        **config.diffusion(schedule="cosine", timesteps=1000, predicts="x0", learned_variance=False, snr_clip=()),
        embedding_scale=17.2,  # Factor of the embeddings: 0.5375 √embedding_dim gives them the variance of pixels.
        whiten=False,  # Embeddings are whitened by the mean and standard deviation of training data in each dimension.
        drop_text=0.1,  # Share of training examples without caption and text embedding, from 0 to 1; for guidance.
    ),
    sampling=dict(
        **config.guided_sampling(sampler="analytic", steps="64", eta=0.0, guidance_scale=1.0, clip_x0=0.0,
                                 temperature=1.0),
        draws=2,  # Embeddings that are drawn for each caption; the one nearest to its text embedding is kept.
    ),
    init=config.init(bundle="", model=False),
    clip=config.clip(bundle="", config=""),
    data=config.embedding_data(source="", data_dir="~/tensorflow_datasets", split="train", eval_split="test",
                               weights=(), image_feature="image", caption_feature="caption",
                               tokenizer="", embeddings="",
                               min_side=0, max_aspect=0.0, crop="dalle", threads=16, workers=0),
    optim=config.adam(learning_rate=1.1e-4, warmup_steps=1000, schedule="constant", b1=0.9, b2=0.96, eps=1e-6,
                      weight_decay=6e-2, clip_norm=1.0, ema_decay=0.9999, accumulate=1, frozen=(), lora_rank=0),
    train=config.train(steps=600_000, batch_size=4096, seed=0, log_every=50,
                       checkpoint_every=5000, checkpoint_minutes=30.0,
                       sample_every=10000, eval_size=1024, draw_size=64, measure=(), inception="", reference="",
                       keep=3, keep_every=0, max_skips=20, watchdog_minutes=60.0, expected_loss=()),
)

SMALL = dict(
    model=dict(embedding_dim=512, vocab_size=1024, context=32, width=512, depth=8, heads=8, remat=False),
    diffusion=dict(embedding_scale=12.16),
    data=dict(source="tfds:emoji_scenes/pair_256", crop="center"),
    optim=dict(learning_rate=0.0003, ema_decay=0.999),
    train=dict(steps=20000, batch_size=512, checkpoint_every=1000, sample_every=2000),
)

TINY = dict(
    dtype="float32",
    model=dict(embedding_dim=64, vocab_size=512, context=24, width=128, depth=4, heads=2, remat=False),
    diffusion=dict(embedding_scale=4.3),
    clip=dict(config="configs/clip.py:tiny"),
    data=dict(source="tfds:emoji_scenes/single_64", crop="center", threads=2),
    optim=dict(learning_rate=0.001, warmup_steps=50, schedule="cosine", weight_decay=0.01, b2=0.99, ema_decay=0.99),
    train=dict(steps=260, batch_size=128, checkpoint_every=500, sample_every=100000, keep=2,
               expected_loss=((50, 0.036, 0.1), (150, 0.022, 0.056), (260, 0.015, 0.045))),
)

SHIPPED = dict(
    dtype="float32",
    model=dict(embedding_dim=128, vocab_size=1024, context=36, width=128, depth=4, heads=2, remat=False),
    diffusion=dict(embedding_scale=6.08),
    clip=dict(config="configs/clip.py:shipped"),
    data=dict(source="tfds:emoji_scenes/varied_64 + tfds:emoji_scenes/single_64", weights=(1.0, 1.0), crop="center",
              threads=2),
    optim=dict(learning_rate=0.001, warmup_steps=200, schedule="cosine", weight_decay=0.01, b2=0.99, ema_decay=0.995),
    train=dict(steps=4500, batch_size=128, checkpoint_every=500, sample_every=2000, eval_size=256, keep=2),
)


def get_config(size: str = "paper") -> config.ConfigDict:
    return config.sized(size, PAPER, small=SMALL, tiny=TINY, shipped=SHIPPED)
