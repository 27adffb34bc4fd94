"""Published VQGANs: taming-transformers' (2012.09841), its Flax port of DALL-E Mini, and LlamaGen's (2406.06525).

They share one architecture under three naming schemes. The sizes of the networks and the kind of quantizer are derived
from the tensors, so other sizes of the same code can be read; no file states the pixel range.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from dalle_jax.config import GumbelQuantizer, VectorQuantizer, VQGANConfig
from dalle_jax.importers.formats.files import read_tensor_files
from dalle_jax.importers.tensors import (
    ImportedModel,
    LazyModel,
    ParamRule,
    Tensors,
    check_tensors_used,
    conv_as_linear,
    count_layers,
    identity,
    tensor_rule,
    tensor_shape,
    to_imported_model,
    transpose_conv,
)

PixelRange = Literal["symmetric", "unit"]


class Naming(NamedTuple):
    """How a code base names the layers; `{}` is a number.

    Attributes:
      model: The model, for error messages.
      join: What separates the parts of a name.
      levels: Of the encoder and the decoder.
      deepest_first: Whether the decoder's levels are numbered in the order in which they run.
      block, attention, middle: The blocks of a level and of the middle.
      params: The parameter of a convolution, a norm and a table.
      flax: Whether arrays have this library's layout.
    """

    model: str
    join: str
    levels: tuple[str, str]
    deepest_first: bool
    block: str
    attention: str
    middle: tuple[str, str, str]
    params: tuple[str, str, str]
    flax: bool


TAMING = Naming(
    "a taming VQGAN", ".", ("down.{}", "up.{}"), False, "block.{}", "attn.{}",
    ("block_1", "attn_1", "block_2"), ("weight", "weight", "weight"), False,
)  # fmt: skip
FLAX = Naming(
    "a Flax VQGAN", "/", ("down_{}", "up_{}"), False, "block_{}", "attn_{}",
    ("block_1", "attn_1", "block_2"), ("kernel", "scale", "embedding"), True,
)  # fmt: skip
LLAMAGEN = Naming(
    "a LlamaGen tokenizer", ".", ("conv_blocks.{}", "conv_blocks.{}"), True, "res.{}", "attn.{}",
    ("0", "1", "2"), ("weight", "weight", "weight"), False,
)  # fmt: skip


def load_taming_vqgan(
    path: Path, image_size: int | None = None, pixel_range: PixelRange | None = None
) -> ImportedModel:
    """Open a Lightning checkpoint of taming-transformers.

    Args:
      path: The checkpoint.
      image_size: The side of the images, 256 by default; no tensor depends on it.
      pixel_range: The range of the pixels that the networks read; [-1, 1] by default.
    """
    return to_imported_model(open_taming_vqgan(path, image_size, pixel_range))


def open_taming_vqgan(
    path: Path, image_size: int | None = None, pixel_range: PixelRange | None = None
) -> LazyModel:
    """The model of `load_taming_vqgan`; the discriminator and the LPIPS network, under `loss.`, are dropped."""
    tensors = _drop_prefix(read_tensor_files(path), "loss.")
    return from_tensors(path, tensors, TAMING, image_size, pixel_range)


def load_flax_vqgan(
    path: Path, image_size: int | None = None, pixel_range: PixelRange | None = None
) -> ImportedModel:
    """Open `flax_model.msgpack` of `dalle-mini/vqgan_imagenet_f16_16384`; arguments as of `load_taming_vqgan`.

    DALL-E Mini feeds it pixels in [0, 1], although it was trained on [-1, 1]; [0, 1] is the default here too.
    """
    tensors = {name.removeprefix("params/"): tensor for name, tensor in read_tensor_files(path).items()}
    return to_imported_model(from_tensors(path, tensors, FLAX, image_size, pixel_range or "unit"))


def load_llamagen_vq(path: Path, image_size: int | None = None) -> ImportedModel:
    """Open `vq_ds16_c2i.pt`, `vq_ds16_t2i.pt` or `vq_ds8_c2i.pt`, whose codes are compared on the unit sphere."""
    tensors = _drop_prefix(read_tensor_files(path), "quantize.codebook_used")
    return to_imported_model(from_tensors(path, tensors, LLAMAGEN, image_size, None))


def _drop_prefix(tensors: Tensors, prefix: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def from_tensors(
    path: Path, tensors: Tensors, naming: Naming, image_size: int | None, pixel_range: PixelRange | None
) -> LazyModel:
    """Return the VQGAN of all `tensors`. Raises ValueError, listing the tensors that are missing or unknown."""
    cfg = _config(path, tensors, naming, image_size or 256, pixel_range or "symmetric")
    rules = _rules(cfg, naming)
    check_tensors_used(rules, tensors, path, naming.model)
    return LazyModel(cfg, rules, tensors, path)


def _config(
    path: Path, tensors: Tensors, naming: Naming, image_size: int, pixel_range: PixelRange
) -> VQGANConfig:
    join, kernel, table = naming.join, naming.params[0], naming.params[2]

    def shape(*parts: str, ndim: int = 4) -> tuple[int, ...]:
        return tensor_shape(tensors, join.join(parts), path, ndim, naming.model)

    out = 3 if naming.flax else 0  # axis of a convolution's outputs
    width = shape("encoder", "conv_in", kernel)[out]
    level = join.join(["encoder", naming.levels[0]])
    levels = count_layers(tensors, join.join([level, naming.block.format(0), "conv1", kernel]))
    blocks = count_layers(tensors, join.join([level.format(0), naming.block, "conv1", kernel]))
    firsts = [shape(level.format(i), naming.block.format(0), "conv1", kernel)[out] for i in range(levels)]
    if levels == 0 or any(first % width for first in firsts):
        raise ValueError(
            f"Expected {naming.model}, "
            f"got {path} with {firsts} channels in its levels and {width} in the first layer."
        )
    attention = [
        i for i in range(levels)
        if join.join([level.format(i), naming.attention.format(0), "q", kernel]) in tensors
    ]  # fmt: skip
    if join.join(["quantize", "proj", kernel]) in tensors:
        vocab, dim = shape("quantize", "embed", table, ndim=2)
        quantizer = GumbelQuantizer(vocab=vocab, dim=dim)
    else:
        vocab, dim = shape("quantize", "embedding", table, ndim=2)
        quantizer = VectorQuantizer(vocab=vocab, dim=dim, normalize=naming is LLAMAGEN)
    return VQGANConfig(
        image_size=image_size, width=width, channel_multipliers=tuple(first // width for first in firsts),
        blocks=blocks,
        attention_levels=tuple(attention), latent_width=shape("encoder", "conv_out", kernel)[out],
        quantizer=quantizer, pixel_range=pixel_range,
    )  # fmt: skip


def _rules(cfg: VQGANConfig, naming: Naming) -> dict[str, ParamRule]:
    rules: dict[str, ParamRule] = {}
    for to, source, kind in _layers(cfg, naming):
        is_conv = kind == "conv"
        name = naming.params[0 if is_conv else 1]
        transform = transpose_conv if is_conv and not naming.flax else identity
        rules[f"{to}/{'kernel' if is_conv else 'scale'}"] = tensor_rule(
            naming.join.join([*source, name]), transform
        )
        rules[f"{to}/bias"] = tensor_rule(naming.join.join([*source, "bias"]), identity)
    quantize, table = "quantize" + naming.join, naming.join + naming.params[2]
    if isinstance(cfg.quantizer, GumbelQuantizer):
        proj = f"{quantize}proj{naming.join}"
        rules["quantize/proj/kernel"] = tensor_rule(proj + naming.params[0], conv_as_linear)
        rules["quantize/proj/bias"] = tensor_rule(proj + "bias", identity)
        rules["quantize/embedding"] = tensor_rule(f"{quantize}embed{table}", identity)
    else:
        rules["quantize/embedding"] = tensor_rule(f"{quantize}embedding{table}", identity)
    return rules


def _layers(cfg: VQGANConfig, naming: Naming) -> Iterator[tuple[str, list[str], str]]:
    """Yield (path in this library, parts of the name in the file, `conv` or `norm`) for every layer with parameters."""
    for name in ("quant_conv", "post_quant_conv"):
        yield name, [name], "conv"
    deepest = len(cfg.channel_multipliers) - 1
    for part, way, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        decoder = part == "decoder"
        for name, kind in (("conv_in", "conv"), ("norm_out", "norm"), ("conv_out", "conv")):
            yield f"{part}/{name}", [part, name], kind
        for name, theirs in zip(("block_1", "attn_1", "block_2"), naming.middle, strict=True):
            yield from _block_layers(
                f"{part}/mid/{name}", [part, "mid", theirs], name.startswith("attn"), False
            )
        # Channel multiplier of the input of each block; the decoder begins at the deepest level.
        in_multiplier = cfg.channel_multipliers[-1] if decoder else 1
        for level in range(deepest, -1, -1) if decoder else range(deepest + 1):
            number = deepest - level if decoder and naming.deepest_first else level
            there = naming.levels[decoder].format(number)
            for j in range(cfg.blocks + decoder):
                to, source = f"{part}/{way}_{level}", [part, there]
                widens = in_multiplier != cfg.channel_multipliers[level]
                yield from _block_layers(f"{to}_block_{j}", [*source, naming.block.format(j)], False, widens)
                if level in cfg.attention_levels:
                    yield from _block_layers(
                        f"{to}_attn_{j}", [*source, naming.attention.format(j)], True, False
                    )
                in_multiplier = cfg.channel_multipliers[level]
            if level != (0 if decoder else deepest):
                yield f"{part}/{way}_{level}_{resample}", [part, there, resample, "conv"], "conv"


def _block_layers(
    to: str, source: list[str], attention: bool, widens: bool
) -> Iterator[tuple[str, list[str], str]]:
    if attention:
        names = ["norm", "q", "k", "v", "proj_out"]
    else:
        names = ["norm1", "conv1", "norm2", "conv2"] + ["nin_shortcut"] * widens
    for name in names:
        yield f"{to}/{name}", [*source, name], "norm" if name.startswith("norm") else "conv"
