"""The decoder: CLIP image embedding and caption → 64 px picture (tiny: 16 px).

    python -m unclip_jax.train --config=configs/decoder.py:tiny --workdir=runs/decoder \\
        --config.clip.bundle=runs/clip/bundle

paper  512 channels and a text path of 24 layers of width 2048, 3,565,434,374 parameters (unCLIP, appendix C, table 3;
       the topology is ADM's). For a TPU slice, with a dataset of your own.
small  Emoji scenes of two objects, for one GPU.
tiny   Emoji scenes of one object, for two CPU cores; trains its CLIP first if none is named. It predicts x0, which
       learns faster in a short run than the papers' eps with a learned variance. Takes 347 s.
       Given true embeddings of 64 held-out scenes, object right in 92%, background in 100%.
miniature  The paper's recipe with tiny's networks: eps and L_vlb with a learned variance, dropout, bfloat16, captions
       dropped by half, 250 steps of DDPM. On a CPU add --config.dtype=float32: its compiler is slow with bfloat16.
       Takes 94 minutes on two busy cores. Of 512 drawings of held-out scenes, object and background are right in 95%
       (experiments/recipe).
shipped  The decoder of the cascade that comes with this package: 32 px, tiny's recipe. A run takes 82 minutes of a CPU
       core; the weights are of three, each on from the one before (unclip_jax/weights/README.md).
"""

from unclip_jax import config

PAPER = config.recipe(
    stage="decoder", dtype="bfloat16", mesh=config.mesh(data=-1, fsdp=1),
    model=dict(
        **config.pictures(image_size=64),
        **config.embedding(embedding_dim=1024),
        embedding="image",  # CLIP embedding that it learns from: "image", the picture's; "text", the caption's.
        image_tokens=4,  # Tokens of context that are made of the CLIP embedding.
        **config.reader(caption="own"),
        learned_null=False,  # A learned vector stands for a dropped CLIP embedding; False: zeros do.
        unet=config.attention_unet(channels=512, channel_mult=(1, 2, 3, 4), res_blocks=3, attention=(2, 4, 8),
                                   middle_attention=True, head_channels=64, heads=(0, 0), norm_groups=32,
                                   scale_shift=True, resample_blocks=True, dropout=0.1, remat=False),
        text=config.text(vocab_size=50257, context=256, width=2048, depth=24, heads=32),
    ),
    diffusion=dict(
        **config.caption_diffusion(schedule="cosine", timesteps=1000, predicts="eps", learned_variance=True,
                                   snr_clip=(), drop_caption=0.5),
        drop_embedding=0.1,  # Share of training examples without their CLIP embedding, from 0 to 1; for guidance.
    ),
    sampling=config.guided_sampling(sampler="ddpm", steps="250", eta=0.0, clip_x0=1.0, temperature=1.0,
                                    guidance_scale=1.25),  # the paper's for its FID table
    init=config.init(bundle="", model=False),
    clip=config.clip(bundle="", config=""),
    data=config.embedding_data(source="", data_dir="~/tensorflow_datasets", split="train", eval_split="test",
                               weights=(), image_feature="image", caption_feature="caption",
                               tokenizer="", embeddings="",
                               min_side=0, max_aspect=0.0, crop="dalle", threads=16, workers=0),
    optim=config.adam(learning_rate=1.2e-4, warmup_steps=0, schedule="constant", b1=0.9, b2=0.999, eps=1e-8,
                      weight_decay=0.0, clip_norm=0.0, ema_decay=0.9999, accumulate=1, frozen=(), lora_rank=0),
    train=config.train(steps=800_000, batch_size=2048, seed=0, log_every=50,
                       checkpoint_every=4000, checkpoint_minutes=30.0,
                       sample_every=10000, eval_size=1024, draw_size=64, measure=(), inception="", reference="",
                       keep=3, keep_every=0, max_skips=20, watchdog_minutes=60.0, expected_loss=()),
)

SMALL = dict(
    model=dict(embedding_dim=512, learned_null=True, unet=dict(channels=128, res_blocks=2),
               text=dict(vocab_size=1024, context=32, width=512, depth=6, heads=8)),
    sampling=dict(guidance_scale=2.0),
    data=dict(source="tfds:emoji_scenes/pair_256", crop="center"),
    optim=dict(warmup_steps=1000, ema_decay=0.999),
    train=dict(steps=100000, batch_size=128, sample_every=5000),
)

TINY = dict(
    dtype="float32",
    model=dict(image_size=16, embedding_dim=64, learned_null=True,
               unet=dict(channels=24, channel_mult=(1, 2, 4), res_blocks=1, attention=(2, 4), head_channels=24,
                         norm_groups=8, dropout=0.0),
               text=dict(vocab_size=512, context=24, width=64, depth=2, heads=2)),
    diffusion=dict(predicts="x0", learned_variance=False, snr_clip=(0.3, 5.0)),
    sampling=dict(sampler="ddim", steps="25", guidance_scale=1.5),
    clip=dict(config="configs/clip.py:tiny"),
    data=dict(source="tfds:emoji_scenes/single_64", crop="center", threads=2),
    optim=dict(learning_rate=0.003, warmup_steps=100, schedule="cosine", b2=0.99, clip_norm=1.0, ema_decay=0.995),
    train=dict(steps=1300, batch_size=32, checkpoint_every=400, sample_every=100000, keep=2,
               expected_loss=((100, 0.065, 0.17), (600, 0.03, 0.08), (1300, 0.012, 0.045))),
)

# The paper's recipe with smaller numbers: the networks', the batch's and the run's.
MINIATURE = dict(
    model=dict(image_size=16, embedding_dim=64,
               unet=TINY["model"]["unet"] | dict(dropout=0.1), text=TINY["model"]["text"]),
    clip=TINY["clip"],
    data=TINY["data"],
    optim=dict(learning_rate=0.002, warmup_steps=100, schedule="cosine", ema_decay=0.9995),
    train=dict(steps=12000, batch_size=32, checkpoint_every=1000, sample_every=3000, keep=2, measure=("alignment",),
               expected_loss=((100, 0.07, 0.8), (1000, 0.035, 0.7), (3000, 0.02, 0.3), (12000, 0.01, 0.2))),
)

SHIPPED = dict(
    dtype="float32",
    model=dict(image_size=32, embedding_dim=128, learned_null=True, unet=TINY["model"]["unet"],
               text=dict(vocab_size=1024, context=36, width=96, depth=3, heads=3)),
    diffusion=TINY["diffusion"] | dict(snr_clip=(1.0, 5.0), drop_caption=0.2),
    sampling=dict(sampler="dpm++", steps="10", guidance_scale=1.5),
    clip=dict(config="configs/clip.py:shipped"),
    data=dict(source="tfds:emoji_scenes/varied_64 + tfds:emoji_scenes/single_64", weights=(1.0, 2.0), crop="center",
              threads=2),
    optim=dict(learning_rate=0.002, warmup_steps=200, schedule="cosine", b2=0.99, clip_norm=1.0, ema_decay=0.998),
    train=dict(steps=3000, batch_size=32, checkpoint_every=500, sample_every=1000, eval_size=256, keep=2),
)


def get_config(size: str = "paper") -> config.ConfigDict:
    return config.sized(size, PAPER, small=SMALL, tiny=TINY, shipped=SHIPPED, miniature=MINIATURE)
