"""GLIDE's base model: caption → 64 px picture (tiny: 16 px).

    python -m unclip_jax.train --config=configs/glide.py:tiny --workdir=runs/glide

From a trained one, as in the paper, models are fine-tuned that can be guided (section 4.2) or fill in what is erased of
a picture (section 4.3; the upsampler likewise):

    python -m unclip_jax.train --config=configs/glide.py:paper --workdir=runs/glide_guided \\
        --config.init.bundle=runs/glide/bundle --config.diffusion.drop_caption=0.2 --config.train.steps=500000
    python -m unclip_jax.train --config=configs/glide.py:paper --workdir=runs/glide_inpaint \\
        --config.init.bundle=runs/glide/bundle --config.diffusion.drop_caption=0.2 --config.train.steps=500000 \\
        --config.model.inpaint=True

paper  512 channels and a text path of 24 layers of width 2048, 3,554,938,374 parameters (GLIDE, section 4.1). Topology,
       learning rate, Adam and EMA: ADM's at 64 px. Vocabulary and context are not published: as in configs/decoder.py.
       Nor are the steps of fine-tuning: 500K are the released models'. For a TPU slice, with a dataset of your own.
small  Emoji scenes of two objects, for one GPU.
tiny   Emoji scenes of one object, for two CPU cores. It predicts x0, which learns faster in a short run than the
       papers' eps with a learned variance. Took 27 minutes on cores that were half busy with other work; for the first
       half it draws objects at random, and in the end the right one for 63 of 64 held-out captions.
shipped  The GLIDE that comes with this package, with the network of configs/decoder.py:shipped. It begins with that
       decoder's U-Net and with a text path that has learned the decoder's conditions
       (experiments/weights/glide_start.py), since captions are learned slowly from pictures alone.
"""

from unclip_jax import config

PAPER = config.recipe(
    stage="glide", dtype="bfloat16", mesh=config.mesh(data=-1, fsdp=1),
    model=dict(
        **config.pictures(image_size=64),
        factor=0,  # Enlargement: none, since no small picture is given.
        **config.inpainting(inpaint=False),
        unet=config.attention_unet(channels=512, channel_mult=(1, 2, 3, 4), res_blocks=3, attention=(2, 4, 8),
                                   middle_attention=True, head_channels=64, heads=(0, 0), norm_groups=32,
                                   scale_shift=True, resample_blocks=True, dropout=0.1, remat=True),
        text=config.text(vocab_size=50257, context=256, width=2048, depth=24, heads=32),
    ),
    init=config.init(bundle="", model=False),
    diffusion=config.caption_diffusion(schedule="cosine", timesteps=1000, predicts="eps", learned_variance=True,
                                       snr_clip=(), drop_caption=0.0),  # 0.2 in fine-tuning
    sampling=config.guided_sampling(sampler="ddpm", steps="150", eta=0.0, clip_x0=1.0, temperature=1.0,
                                    guidance_scale=3.0),  # once it is fine-tuned for guidance
    data=config.caption_data(source="", data_dir="~/tensorflow_datasets", split="train", eval_split="test",
                             weights=(), image_feature="image", caption_feature="caption", tokenizer="",
                             min_side=0, max_aspect=0.0, crop="dalle", threads=16, workers=0),
    optim=config.adam(learning_rate=3e-4, warmup_steps=0, schedule="constant", b1=0.9, b2=0.999, eps=1e-8,
                      weight_decay=0.0, clip_norm=0.0, ema_decay=0.9999, accumulate=1, frozen=(), lora_rank=0),
    train=config.train(steps=2_500_000, batch_size=2048, seed=0, log_every=50,
                       checkpoint_every=4000, checkpoint_minutes=30.0,
                       sample_every=10000, eval_size=1024, draw_size=64, measure=(), inception="", reference="",
                       keep=3, keep_every=0, max_skips=20, watchdog_minutes=60.0, expected_loss=()),
)

SMALL = dict(
    model=dict(unet=dict(channels=128, res_blocks=2, remat=False),
               text=dict(vocab_size=1024, context=32, width=512, depth=6, heads=8)),
    diffusion=dict(drop_caption=0.2),  # so that it can be guided at once
    data=dict(source="tfds:emoji_scenes/pair_256", crop="center"),
    optim=dict(warmup_steps=1000, ema_decay=0.999),
    train=dict(steps=100000, batch_size=128, sample_every=5000),
)

TINY = dict(
    dtype="float32",
    model=dict(image_size=16,
               unet=dict(channels=24, channel_mult=(1, 2, 4), res_blocks=1, attention=(2, 4), head_channels=24,
                         norm_groups=8, dropout=0.0, remat=False),
               text=dict(vocab_size=512, context=24, width=64, depth=2, heads=2)),
    diffusion=dict(predicts="x0", learned_variance=False,
                   snr_clip=(1.0, 5.0),  # the noisiest steps count: there the caption alone tells what to draw
                   drop_caption=0.2),  # so that it can be guided at once
    sampling=dict(sampler="ddim", steps="25"),
    data=dict(source="tfds:emoji_scenes/single_64", crop="center", threads=2),
    optim=dict(learning_rate=0.003, warmup_steps=100, schedule="cosine", b2=0.99, clip_norm=1.0, ema_decay=0.995),
    train=dict(steps=5000, batch_size=32, checkpoint_every=400, sample_every=100000, keep=2,
               expected_loss=((200, 0.09, 0.23), (1000, 0.06, 0.14), (2500, 0.04, 0.12), (3200, 0.022, 0.09),
                              (5000, 0.018, 0.06))),
)

SHIPPED = dict(
    dtype="float32",
    model=dict(image_size=32, unet=TINY["model"]["unet"],
               text=dict(vocab_size=1024, context=36, width=96, depth=3, heads=3)),
    diffusion=TINY["diffusion"],
    sampling=dict(sampler="dpm++", steps="10", guidance_scale=2.0),
    data=dict(source="tfds:emoji_scenes/varied_64 + tfds:emoji_scenes/single_64", weights=(3.0, 2.0), crop="center",
              threads=2),
    optim=dict(learning_rate=0.001, warmup_steps=200, schedule="cosine", b2=0.99, clip_norm=1.0, ema_decay=0.998),
    train=dict(steps=1000, batch_size=32, checkpoint_every=500, sample_every=1000, eval_size=256, keep=2),
)


def get_config(size: str = "paper") -> config.ConfigDict:
    return config.sized(size, PAPER, small=SMALL, tiny=TINY, shipped=SHIPPED)
