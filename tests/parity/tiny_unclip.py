"""UnCLIP pipelines of the diffusers library at the size of a toy, with random weights in which nothing is zero."""

import json
from unittest import mock

import torch
from diffusers import (
    PriorTransformer,
    UnCLIPImageVariationPipeline,
    UnCLIPPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.schedulers import scheduling_unclip
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

PLAIN, ATTENDING = "Resnet{}Block2D", "SimpleCrossAttn{}Block2D"
VARIANTS = {
    "a": dict(
        context=13,
        dim=16,
        text=dict(num_hidden_layers=2, num_attention_heads=2, hidden_act="quick_gelu", intermediate_size=64),
        vision=dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=32,
                    patch_size=8),
        prior=dict(num_attention_heads=2, attention_head_dim=8, num_layers=2),
        prior_scheduler=dict(prediction_type="sample", clip_sample_range=5.0),
        tokens=4,
        cross=24,
        attends=(False, True, True),
        decoder=dict(block_out_channels=(16, 16, 32), layers_per_block=1, attention_head_dim=8, norm_num_groups=8,
                     sample_size=16, resnet_time_scale_shift="scale_shift"),
        decoder_scheduler=dict(variance_type="learned_range"),
        super_res=dict(block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, sample_size=64,
                       out_channels=3),
        super_res_scheduler=dict(),
    ),
    "b": dict(
        context=9,
        dim=12,
        text=dict(num_hidden_layers=1, num_attention_heads=3, hidden_act="gelu", intermediate_size=37),
        vision=dict(hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                    patch_size=4),
        prior=dict(num_attention_heads=3, attention_head_dim=4, num_layers=3),
        prior_scheduler=dict(prediction_type="sample", clip_sample=False, num_train_timesteps=65),
        tokens=2,
        cross=10,
        attends=(True, False),
        decoder=dict(block_out_channels=(8, 24), layers_per_block=2, attention_head_dim=4, norm_num_groups=4,
                     sample_size=12, resnet_time_scale_shift="default"),
        decoder_scheduler=dict(variance_type="learned_range", prediction_type="sample", clip_sample_range=2.0),
        super_res=dict(block_out_channels=(8, 24), layers_per_block=2, norm_num_groups=8, sample_size=24,
                       out_channels=6, resnet_time_scale_shift="scale_shift"),
        super_res_scheduler=dict(variance_type="learned_range", num_train_timesteps=43),
    ),
}  # fmt: skip


def save_tokenizer(folder, context):
    """CLIP's vocabulary cut down: single bytes and a few merges."""
    from unclip_jax.pretrained.tokenizers import byte_symbols  # their order is tested against transformers'

    merges = [("t", "h"), ("th", "e</w>"), ("r", "e"), ("re", "d</w>"), ("a", "p"), ("ap", "p"), ("l", "e</w>")]
    symbols = byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "CLIPTokenizer", "model_max_length": context, "do_lower_case": True,
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>"}))  # fmt: skip
    return len(tokens)


def randomized(module, seed):
    """The module with weights of which outputs inside are of order one. What it gives out is smaller: guidance by 8
    would else make a chain so sensitive that no two computations of it agree."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("clip_std") or (p.ndim == 1 and name.endswith("weight")):
                p.copy_(1 + 0.1 * noise)
            elif p.ndim > 1 and name.endswith("weight") and "embedding." not in name:
                last = name.startswith(("conv_out", "proj_to_clip_embeddings"))
                p.copy_((0.3 if last else 1.0) * noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.2 * noise)
    return module.eval()


def networks(name):
    """The variant's four networks of diffusers, by the pipelines' names."""
    v = VARIANTS[name]
    channels = v["decoder"]["block_out_channels"][0]
    modules = {
        "prior": PriorTransformer(embedding_dim=v["dim"], num_embeddings=v["context"], **v["prior"]),
        "text_proj": UnCLIPTextProjModel(
            clip_extra_context_tokens=v["tokens"],
            clip_embeddings_dim=v["dim"],
            time_embed_dim=4 * channels,
            cross_attention_dim=v["cross"],
        ),
        "decoder": UNet2DConditionModel(
            in_channels=3,
            out_channels=6,
            class_embed_type="identity",
            cross_attention_dim=v["cross"],
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            **_blocks(v["attends"]),
            **v["decoder"],
        ),
    }
    for part in ("super_res_first", "super_res_last"):
        levels = len(v["super_res"]["block_out_channels"])
        modules[part] = UNet2DModel(in_channels=6, add_attention=False, **_blocks((False,) * levels), **v["super_res"])
    return {part: randomized(module, seed) for seed, (part, module) in enumerate(modules.items())}


def pipelines(name, folder):
    """(UnCLIPPipeline, UnCLIPImageVariationPipeline) of the variant, which share what both have."""
    v = VARIANTS[name]
    vocab_size = save_tokenizer(folder / "tokenizer", v["context"])
    text = CLIPTextConfig(vocab_size=vocab_size, hidden_size=v["dim"], projection_dim=v["dim"],
                          max_position_embeddings=v["context"], bos_token_id=vocab_size - 2,
                          eos_token_id=vocab_size - 1, **v["text"])  # fmt: skip
    vision = CLIPVisionConfig(projection_dim=v["dim"], hidden_act=v["text"]["hidden_act"], **v["vision"])
    side = v["vision"]["image_size"]
    shared = {
        "text_encoder": randomized(CLIPTextModelWithProjection(text), 7),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "decoder_scheduler": UnCLIPScheduler(**v["decoder_scheduler"]),
        "super_res_scheduler": UnCLIPScheduler(**v["super_res_scheduler"]),
        **networks(name),
    }
    prior = {"prior": shared.pop("prior"), "prior_scheduler": UnCLIPScheduler(**v["prior_scheduler"])}
    image = {
        "image_encoder": randomized(CLIPVisionModelWithProjection(vision), 8),
        "feature_extractor": CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
    }
    both = UnCLIPPipeline(**shared, **prior), UnCLIPImageVariationPipeline(**shared, **image)
    for pipeline in both:
        pipeline.set_progress_bar_config(disable=True)
    return both


def exact_scheduler(**config):
    """An UnCLIPScheduler whose tables are in float64: those in float32 hold differences of nearly equal numbers, so
    that the last step of all scales the picture by 0.9995."""
    tensor = torch.tensor
    with mock.patch.object(scheduling_unclip.torch, "tensor", lambda data, **_: tensor(data, dtype=torch.float64)):
        return UnCLIPScheduler(**config)


def _blocks(attends):
    kinds = [ATTENDING if attention else PLAIN for attention in attends]
    # The two kinds are not called alike.
    down = [kind.format("Downsample" if kind == PLAIN else "Down") for kind in kinds]
    up = [kind.format("Upsample" if kind == PLAIN else "Up") for kind in reversed(kinds)]
    return {"down_block_types": tuple(down), "up_block_types": tuple(up)}
