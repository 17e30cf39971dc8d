"""Converts the ADM U-Net of guided-diffusion, whose modules have the same names and order in GLIDE and Karlo."""

from unclip_jax.pretrained.layers import conv, deinterleaved, dense, norm
from unclip_jax.pretrained.state_dict import StateDict, count_blocks


def unet_config(weights: StateDict, head_channels: int, heads: tuple[int, int], norm_groups: int) -> dict:
    """Reads the arguments of `models.unet.UNet` from a state dict's shapes, all but out_channels and dtype.

    head_channels, heads, norm_groups: as in UNet, because no shape tells them. Raises UserError for a tensor that is
    missing.
    """
    channels = weights.shape("time_embed.0.weight")[1]
    rows = count_blocks(weights, "output_blocks.{}.0.in_layers.0.weight")
    # The last output block of a level, but for the largest pictures, holds one module more, which doubles the picture.
    levels = 1 + sum(_doubling(weights, n) is not None for n in range(rows))
    res_blocks = rows // levels - 1
    first = [1 + level * (res_blocks + 1) for level in range(levels)]
    widths = [weights.shape(f"input_blocks.{n}.0.out_layers.3.weight")[0] for n in first]
    return {
        "channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "res_blocks": res_blocks,
        "attention": tuple(2**level for level, n in enumerate(first) if f"input_blocks.{n}.1.qkv.weight" in weights),
        "middle_attention": "middle_block.1.qkv.weight" in weights,
        "head_channels": head_channels,
        "heads": heads,
        "norm_groups": norm_groups,
        "scale_shift": weights.shape("middle_block.0.emb_layers.1.weight")[0] == 2 * widths[-1],
        "resample_blocks": not any(name.endswith(".0.op.weight") for name in weights),
        "dropout": 0.0,
        "remat": False,
    }


def unet_params(weights: StateDict, unet: dict, inputs: int, outputs: int, context: int) -> dict:
    """Converts the parameters of the `models.unet.UNet` whose arguments are `unet`.

    inputs, outputs: number of channels of the first and the last convolution. context: width of the tokens that it
    attends to, such as the caption's; 0: none.
    """
    return _Converter(weights, unet, context).params(inputs, outputs)


def _doubling(weights: StateDict, n: int) -> str | None:
    """Finds the name of the module of output block n that doubles the picture; None if it has none."""
    for place in (1, 2):
        name = f"output_blocks.{n}.{place}"
        if f"{name}.in_layers.0.weight" in weights or f"{name}.conv.weight" in weights:
            return name
    return None


class _Converter:
    """Walks through a U-Net in the order of its modules and converts each of them."""

    def __init__(self, weights: StateDict, unet: dict, context: int):
        self.weights, self.unet, self.context = weights, unet, context
        self.emb = 4 * unet["channels"]

    def params(self, inputs: int, outputs: int) -> dict:
        unet, weights = self.unet, self.weights
        widths = [unet["channels"] * mult for mult in unet["channel_mult"]]
        last, blocks = len(widths) - 1, unet["res_blocks"]
        params = {
            "time": {
                "in": dense(weights, "time_embed.0", unet["channels"], self.emb),
                "out": dense(weights, "time_embed.2", self.emb, self.emb),
            },
            "conv_in": conv(weights, "input_blocks.0.0", inputs, widths[0], 3),
        }

        # Down. n: number of the input block; h: channels so far; skips: channels that the way up will concatenate.
        n, h, skips = 1, widths[0], [widths[0]]
        for level, width in enumerate(widths):
            for i in range(blocks):
                params[f"down_{level}_{i}_res"] = self.res(f"input_blocks.{n}.0", h, width)
                if 2**level in unet["attention"]:
                    params[f"down_{level}_{i}_attention"] = self.attention(f"input_blocks.{n}.1", width, up=False)
                n, h = n + 1, width
                skips.append(h)
            if level < last:
                params[f"down_{level}_resample"] = self.resample(f"input_blocks.{n}.0", h, "op")
                n += 1
                skips.append(h)

        params["middle_0_res"] = self.res("middle_block.0", h, h)
        if unet["middle_attention"]:
            params["middle_attention"] = self.attention("middle_block.1", h, up=False)
        params["middle_1_res"] = self.res(f"middle_block.{1 + unet['middle_attention']}", h, h)

        # Up, from the smallest pictures. n: number of the output block.
        n = 0
        for level in range(last, -1, -1):
            width, attends = widths[level], 2**level in unet["attention"]
            for i in range(blocks + 1):
                params[f"up_{level}_{i}_res"] = self.res(f"output_blocks.{n}.0", h + skips.pop(), width)
                if attends:
                    params[f"up_{level}_{i}_attention"] = self.attention(f"output_blocks.{n}.1", width, up=True)
                if level and i == blocks:
                    params[f"up_{level}_resample"] = self.resample(f"output_blocks.{n}.{1 + attends}", width, "conv")
                n, h = n + 1, width
        params["norm_out"] = norm(weights, "out.0", h)
        params["conv_out"] = conv(weights, "out.2", h, outputs, 3)
        return params

    def res(self, name: str, inputs: int, outputs: int) -> dict:
        """Converts a residual block between so many channels."""
        w, scale_shift = self.weights, self.unet["scale_shift"]
        block = {
            "norm_in": norm(w, f"{name}.in_layers.0", inputs),
            "conv_in": conv(w, f"{name}.in_layers.2", inputs, outputs, 3),
            "film" if scale_shift else "shift": dense(w, f"{name}.emb_layers.1", self.emb, (1 + scale_shift) * outputs),
            "norm_out": norm(w, f"{name}.out_layers.0", outputs),
            "conv_out": conv(w, f"{name}.out_layers.3", outputs, outputs, 3),
        }
        return block if inputs == outputs else block | {"skip": conv(w, f"{name}.skip_connection", inputs, outputs, 1)}

    def resample(self, name: str, width: int, plain: str) -> dict:
        """Converts a module that halves or doubles the picture: a residual block, or the convolution called `plain`."""
        if self.unet["resample_blocks"]:
            return self.res(name, width, width)
        return conv(self.weights, f"{name}.{plain}", width, width, 3)

    def attention(self, name: str, width: int, up: bool) -> dict:
        """Converts an attention block. up: on the way up, where the number of heads may be another."""
        head_channels = self.unet["head_channels"]
        heads = width // head_channels if head_channels else self.unet["heads"][up]
        block = {
            "norm": norm(self.weights, f"{name}.norm", width),
            "qkv": deinterleaved(self._conv1d(f"{name}.qkv", width, 3 * width), heads, 3),
            "out": self._conv1d(f"{name}.proj_out", width, width),
        }
        if self.context:
            kv = self._conv1d(f"{name}.encoder_kv", self.context, 2 * width)
            block["context_kv"] = deinterleaved(kv, heads, 2)
        return block

    def _conv1d(self, name: str, inputs: int, outputs: int) -> dict:
        """Converts a convolution with a kernel of one place, which is a linear layer."""
        kernel = self.weights.take(f"{name}.weight", outputs, inputs, 1)[..., 0].T
        return {"kernel": kernel, "bias": self.weights.take(f"{name}.bias", outputs)}
