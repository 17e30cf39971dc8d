"""Trains dalle2-pytorch's prior or decoder, and draws with it. `run.py`, beside this file, calls it.

    python theirs.py MODEL DATA OUT OPTIONS

It runs where dalle2-pytorch and CPU torch are installed, and needs nothing of this project. MODEL is "prior" or
"decoder", DATA the data.npz of run.py, OPTIONS a JSON object of `PRIOR` or `DECODER` below. Writes OUT.json, and what
was drawn as OUT.npz.
"""

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator

BEGAN = time.monotonic()
import numpy as np  # noqa: E402 - importing is a part of what is timed
import torch  # noqa: E402

LIBRARIES: list[torch.library.Library] = []  # declarations end with them


def import_torchvision() -> None:
    """Imports torchvision, which dalle2-pytorch needs. The one of PyPI is built for CUDA torch: beside CPU torch its
    library does not load, and the import fails because two operators, which nothing here calls, are not declared."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
        LIBRARIES.append(library)


import_torchvision()
from dalle2_pytorch import (  # noqa: E402
    Decoder,
    DecoderTrainer,
    DiffusionPrior,
    DiffusionPriorNetwork,
    DiffusionPriorTrainer,
    Unet,
)

IMPORTED = time.monotonic() - BEGAN
# encodings: the network sees CLIP's states of the caption's tokens beside its embedding.
PRIOR = dict(steps=240, batch=128, lr=1e-3, seed=0, predicts="x0", encodings=True, depth=6, ema=0.99, warmup=50)
# z: a file of embeddings to draw from, beside the true ones.
DECODER = dict(steps=1300, batch=32, lr=3e-3, seed=0, predicts="x0", ema=0.995, warmup=100, z="", guidance=1.5)
EMA_EVERY = 10  # steps, which is ema_pytorch's own interval


def prior_trainer(o: dict, data: dict) -> DiffusionPriorTrainer:
    """Builds a diffusion prior, which predicts x0, and its trainer."""
    dim, context = data["train_z_image"].shape[1], data["train_states"].shape[1]
    # The network pads to max_text_len even where it is told no states, which takes twice the time.
    length = context if o["encodings"] else 0
    network = DiffusionPriorNetwork(dim=dim, depth=o["depth"], dim_head=64, heads=8, max_text_len=length)
    prior = DiffusionPrior(
        net=network, image_embed_dim=dim, timesteps=1000, sample_timesteps=64, text_cond_drop_prob=0.1,
        image_cond_drop_prob=0.0, condition_on_text_encodings=o["encodings"], sampling_final_clamp_l2norm=True,
    )  # fmt: skip
    return DiffusionPriorTrainer(prior, max_grad_norm=1.0, **schedule(o))


def decoder_trainer(o: dict, data: dict) -> DecoderTrainer:
    """Builds a decoder of 16 px with a U-Net as large as that of configs/decoder.py:tiny, and its trainer."""
    unet = Unet(
        dim=24, image_embed_dim=data["train_z_image"].shape[1], text_embed_dim=data["train_states"].shape[2],
        cond_dim=24, channels=3, dim_mults=(1, 2, 4), num_resnet_blocks=1, self_attn=(False, True, True),
        attn_heads=4, attn_dim_head=32, cond_on_text_encodings=True, max_text_len=data["train_states"].shape[1],
    )  # fmt: skip
    decoder = Decoder(
        unet=unet, image_size=16, timesteps=1000, sample_timesteps=25, image_cond_drop_prob=0.1,
        text_cond_drop_prob=0.5, predict_x_start=o["predicts"] == "x0", predict_v=o["predicts"] == "v",
        learned_variance=False, ddim_sampling_eta=0.0,
    )  # fmt: skip
    return DecoderTrainer(decoder, max_grad_norm=0.5, **schedule(o))


def schedule(o: dict) -> dict:
    """Says how trainers step: a warm-up, then a cosine to 0 over all steps; a moving average of `ema` a step."""
    return dict(lr=o["lr"], wd=1e-2, warmup_steps=o["warmup"], cosine_decay_max_steps=o["steps"], use_ema=True,
                ema_beta=o["ema"] ** EMA_EVERY, ema_update_every=EMA_EVERY, ema_update_after_step=0)  # fmt: skip


def batches(count: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yields numbers of examples from shuffled epochs that follow each other without a gap."""
    generator, rest = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
    while True:
        while len(rest) < size:
            rest = torch.cat([rest, torch.randperm(count, generator=generator)])
        yield rest[:size]
        rest = rest[size:]


def train(step: Callable[[torch.Tensor], float], o: dict, count: int) -> dict:
    """Takes all steps. Returns the median seconds of one and the last loss."""
    order, seconds, losses = batches(count, o["batch"], o["seed"]), [], []
    for number in range(o["steps"]):
        began = time.monotonic()
        losses.append(step(next(order)))
        seconds.append(time.monotonic() - began)
        if number % 100 == 99:
            print(f"step {number + 1}/{o['steps']}, loss {np.mean(losses[-100:]):.4f}", file=sys.stderr, flush=True)
    return {"step_seconds": float(np.median(seconds)), "loss": float(np.mean(losses[-50:]))}


def train_prior(o: dict, data: dict) -> tuple[dict, dict]:
    """Trains a prior and draws an embedding for each held-out caption: of two draws the one nearer to the caption's."""
    torch.manual_seed(o["seed"])
    trainer = prior_trainer(o, data)
    trainer.train()
    z, text, states = (torch.from_numpy(data[f"train_{name}"]) for name in ("z_image", "z_text", "projected"))

    def step(rows: torch.Tensor) -> float:
        encodings = dict(text_encodings=states[rows]) if o["encodings"] else {}
        loss = trainer(text_embed=text[rows], image_embed=z[rows], **encodings)
        trainer.update()
        return loss

    report = train(step, o, len(z)) | {"parameters": parameters(trainer.diffusion_prior.net)}
    report["training_seconds"] = time.monotonic() - BEGAN
    trainer.eval()
    drawn = {}
    for split in ("known", "test"):
        rows = (torch.from_numpy(data[f"{split}_{name}"]) for name in ("z_text", "projected"))
        z_t, told = (each.repeat_interleave(2, 0) for each in rows)
        condition = {"text_embed": z_t} | ({"text_encodings": told} if o["encodings"] else {})
        began = time.monotonic()
        with torch.no_grad():
            pairs = trainer.p_sample_loop(z_t.shape, text_cond=condition, cond_scale=1.0, timesteps=64)
        pairs = torch.nn.functional.normalize(pairs, dim=-1)
        nearer = (pairs * z_t).sum(-1).reshape(-1, 2).argmax(1)
        drawn[split] = pairs.reshape(len(nearer), 2, -1)[torch.arange(len(nearer)), nearer].numpy()
        report["drawing_seconds"] = time.monotonic() - began
    return report, drawn


def train_decoder(o: dict, data: dict) -> tuple[dict, dict]:
    """Trains a decoder and draws a picture for each held-out caption, from true embeddings and from those in `z`."""
    torch.manual_seed(o["seed"])
    trainer = decoder_trainer(o, data)
    trainer.train()
    images = torch.from_numpy(data["train_images"]).permute(0, 3, 1, 2).contiguous()
    z, states = (torch.from_numpy(data[f"train_{name}"]) for name in ("z_image", "states"))

    def step(rows: torch.Tensor) -> float:
        loss = trainer(images[rows].float() / 255, image_embed=z[rows], text_encodings=states[rows], unet_number=1)
        trainer.update(1)
        return loss

    report = train(step, o, len(z)) | {"parameters": parameters(trainer.decoder.unets[0])}
    report["training_seconds"] = time.monotonic() - BEGAN
    given = {"known": ("known", data["known_z_image"]), "test": ("test", data["test_z_image"])}
    if o["z"]:
        given["full"] = "test", np.load(o["z"])["test"]
    drawn = {}
    for name, (split, embeddings) in given.items():
        began = time.monotonic()
        told, z = (torch.from_numpy(rows) for rows in (data[f"{split}_states"], embeddings))
        pictures = trainer.sample(image_embed=z, text_encodings=told, cond_scale=o["guidance"])
        pictures = pictures.clamp(0, 1).permute(0, 2, 3, 1).numpy()
        drawn[name] = np.rint(pictures * 255).astype(np.uint8)
        report["drawing_seconds"] = time.monotonic() - began
    return report, drawn


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def main(model: str, data: str, out: str, options: str) -> None:
    torch.set_num_threads(2)
    defaults, run = {"prior": (PRIOR, train_prior), "decoder": (DECODER, train_decoder)}[model]
    given = json.loads(options)
    if unknown := given.keys() - defaults.keys():
        sys.exit(f"no options {', '.join(sorted(unknown))}: expected some of {', '.join(defaults)}")
    with np.load(data) as file:
        report, drawn = run(defaults | given, {name: file[name] for name in file.files})
    np.savez(f"{out}.npz", **drawn)
    report |= {"options": defaults | given, "import_seconds": IMPORTED}
    report["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with open(f"{out}.json", "w") as file:
        json.dump(report, file, indent=2)


if __name__ == "__main__":
    main(*sys.argv[1:])
