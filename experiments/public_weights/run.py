"""Do the public models convert at their full size in less than 2.5 times their size of memory, and run?

    pip install torch && pip install -e '.[parity]'
    python experiments/public_weights/run.py --work /tmp/public_weights

Writes random weights of the published sizes in the published formats, converts each family with `python -m
unclip_jax.pretrained`, and lets every model draw by a single step. Conversion and drawing are processes of their own,
whose peak memory the kernel tells. Prints a line for each and writes report.json beside this file. Needs 35 GB of disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
MARKS = ("<|startoftext|>", "<|endoftext|>")


def write_glide(folder: Path) -> None:
    """base.pt and upsample.pt, of the tensors that the converter asks for."""
    import numpy as np
    import torch

    from unclip_jax.pretrained import adm, glide
    from unclip_jax.pretrained.layers import dense
    from unclip_jax.pretrained.state_dict import StateDict

    class Recorder(StateDict):
        def take(self, name, *shape):
            tensors[name] = torch.randn(shape) * (shape[0] ** -0.5 if len(shape) > 1 else 0.1)
            return np.broadcast_to(np.float32(0), shape)

    shared = dict(channels=192, middle_attention=True, head_channels=64, heads=(1, 1), scale_shift=True)
    shared |= dict(resample_blocks=True)
    networks = {
        "base": (3, dict(channel_mult=(1, 2, 3, 4), res_blocks=3, attention=(2, 4, 8))),
        "upsample": (6, dict(channel_mult=(1, 1, 2, 2, 4, 4), res_blocks=2, attention=(8, 16, 32))),
    }
    for name, (inputs, unet) in networks.items():
        tensors = {}
        adm.unet_params(Recorder({}, name), shared | unet, inputs, 6, 512)
        glide.text_params(Recorder({}, name), dict(vocab_size=50257, context=128, width=512, depth=16, heads=8))
        dense(Recorder({}, name), "transformer_proj", 512, 768)
        torch.save(tensors, folder / f"{name}.pt")
    write_vocabulary(folder, "encoder.json", "vocab.bpe", marks=MARKS[1:])


def write_openai_clip(folder: Path) -> None:
    """ViT-L/14 as transformers saves it."""
    from transformers import CLIPConfig, CLIPModel

    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    vision |= dict(patch_size=14, image_size=224, projection_dim=768)
    CLIPModel(CLIPConfig(vision_config=vision, text_config=clip_text(), projection_dim=768)).save_pretrained(folder)
    write_vocabulary(folder)


def write_karlo(folder: Path) -> None:
    """Prior, decoder, both upsampling networks and CLIP's text tower as diffusers saves them."""
    from diffusers import PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    down, up = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    cross_down, cross_up = "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnUpBlock2D"
    unet = dict(block_out_channels=(320, 640, 960, 1280), layers_per_block=3)
    upsampler = unet | dict(sample_size=256, in_channels=6, out_channels=3, down_block_types=(down,) * 4)
    upsampler |= dict(up_block_types=(up,) * 4, add_attention=False, resnet_time_scale_shift="default")
    decoder = unet | dict(sample_size=64, in_channels=3, out_channels=6, cross_attention_dim=1536)
    decoder |= dict(down_block_types=(down, *(cross_down,) * 3), up_block_types=(*(cross_up,) * 3, up))
    decoder |= dict(mid_block_type="UNetMidBlock2DSimpleCrossAttn", attention_head_dim=64)
    decoder |= dict(resnet_time_scale_shift="scale_shift", class_embed_type="identity", only_cross_attention=False)
    prior = dict(num_attention_heads=32, attention_head_dim=64, num_layers=20, embedding_dim=768, num_embeddings=77)
    projection = dict(clip_extra_context_tokens=4, clip_embeddings_dim=768, time_embed_dim=1280)
    models = {
        "prior": lambda: PriorTransformer(**prior, additional_embeddings=4),
        "decoder": lambda: UNet2DConditionModel(**decoder),
        "text_proj": lambda: UnCLIPTextProjModel(**projection, cross_attention_dim=1536),
        "text_encoder": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**clip_text())),
        "super_res_first": lambda: UNet2DModel(**upsampler),
        "super_res_last": lambda: UNet2DModel(**upsampler),
        "prior_scheduler": lambda: UnCLIPScheduler(
            prediction_type="sample", variance_type="fixed_small_log", clip_sample_range=5.0
        ),
        "decoder_scheduler": lambda: UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": lambda: UnCLIPScheduler(variance_type="fixed_small_log"),
    }
    for name, make in models.items():
        make().save_pretrained(folder / name)
    index = {name: ["diffusers", ""] for name in models} | {"tokenizer": ["transformers", ""]}
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "UnCLIPPipeline"}))
    (folder / "tokenizer").mkdir()
    write_vocabulary(folder / "tokenizer")


def clip_text() -> dict:
    sizes = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    return sizes | dict(projection_dim=768)


def write_vocabulary(folder: Path, tokens="vocab.json", merges="merges.txt", marks=MARKS) -> None:
    """Of single bytes: enough for the loaders, and nothing here reads a caption for its sense."""
    from unclip_jax.pretrained.tokenizers import byte_symbols

    words = byte_symbols() + ([symbol + "</w>" for symbol in byte_symbols()] if len(marks) == 2 else [])
    (folder / tokens).write_text(json.dumps({token: n for n, token in enumerate([*words, *marks])}))
    (folder / merges).write_text("#version: 0.2\n")


def draw(bundle: str, clip_bundle: str) -> None:
    """One step of sampling by the model of a bundle; a CLIP reads a picture and a caption. Prints its parameters."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from unclip_jax.bundle import load_bundle
    from unclip_jax.planning.programs import conditions
    from unclip_jax.stages import make_stage

    clip = load_bundle(clip_bundle) if clip_bundle else None
    clip_stage = make_stage(clip.config) if clip else None
    loaded = load_bundle(bundle)
    config = loaded.config.copy_and_resolve_references().unlock()
    stage = make_stage(config, clip_stage)
    params = loaded.params
    if config.stage == "clip":
        context, size = config.model.text.context, config.model.image_size
        out = jax.jit(stage.embed_texts)(params, np.ones((1, context), np.int32), np.full(1, 5, np.int32))
        if config.model.image:
            out = jnp.concatenate([out, jax.jit(stage.embed_images)(params, np.zeros((1, size, size, 3), np.uint8))])
    else:
        config.sampling.steps = "1"

        def fill(spec):
            return np.full(spec.shape, 2 if spec.dtype == jnp.int32 or not spec.shape else 0.5, spec.dtype)

        given = jax.tree.map(fill, conditions(stage, 1))
        out = jax.jit(stage.sample)(params, clip.params if clip else {}, given, jax.random.key(0))
    assert np.isfinite(np.asarray(out)).all()
    print(sum(leaf.size for leaf in jax.tree.leaves(params)))


def measured(*command: str) -> tuple[str, float, float]:
    """What a process printed last, its seconds, and its peak memory in GB."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return (output.split() or [""])[-1], time.monotonic() - began, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the weights; emptied at the end")
    parser.add_argument("--families", nargs="+", default=["openai_clip", "glide", "karlo"])
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--draw", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        return globals()[f"write_{args.write}"](args.work)
    if args.draw:
        return draw(*args.draw)
    path = HERE / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for family in args.families:
        source, out = args.work / family, args.work / f"{family}_out"
        source.mkdir(parents=True)
        me = sys.executable, str(Path(__file__))
        measured(*me, "--work", str(source), "--write", family)
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file()) / 1e9
        convert = sys.executable, "-m", "unclip_jax.pretrained", family, str(source), "--out", str(out)
        _, seconds, memory = measured(*convert)
        largest = max(path.stat().st_size for path in source.rglob("*") if path.is_file()) / 1e9
        entry = {"size_gb": size, "largest_file_gb": largest, "convert_seconds": seconds, "convert_peak_gb": memory}
        report[family] = {name: round(value, 2) for name, value in entry.items()} | {"models": {}}
        print(family, report[family], flush=True)
        shutil.rmtree(source)
        for config in sorted(out.rglob("config.json")):
            clip = str(out / "clip") if family == "karlo" and config.parent.name in ("prior", "decoder") else ""
            count, seconds, memory = measured(*me, "--work", str(out), "--draw", str(config.parent), clip)
            name = str(config.parent.relative_to(out))
            entry = {"parameters": int(count), "step_seconds": round(seconds), "peak_gb": round(memory, 2)}
            report[family]["models"][name] = entry
            print(family, name, entry, flush=True)
        shutil.rmtree(out)
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
