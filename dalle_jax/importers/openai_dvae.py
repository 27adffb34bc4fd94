"""OpenAI's dVAE (`encoder.pkl`, `decoder.pkl`; 2102.12092): pickled modules, of which only the tensors are read."""

from __future__ import annotations

from pathlib import Path

from dalle_jax.config import DVAEConfig
from dalle_jax.importers.formats.files import read_tensor_files
from dalle_jax.importers.tensors import (
    ImportedModel,
    LazyModel,
    ParamRule,
    Tensors,
    check_tensors_used,
    count_layers,
    identity,
    tensor_rule,
    tensor_shape,
    to_imported_model,
    transpose_conv,
)

_MODEL = "OpenAI's dVAE"


def load_params(path: Path, image_size: int | None = None) -> ImportedModel:
    """Open a directory with encoder.pkl and decoder.pkl.

    Args:
      path: The directory.
      image_size: The side of the images, 256 by default; no tensor depends on it.

    Raises:
      FileNotFoundError: A file is missing.
      ValueError: A file is of another model.
    """
    tensors: Tensors = {}
    for part in ("encoder", "decoder"):
        file = path / f"{part}.pkl"
        if not file.is_file():
            raise FileNotFoundError(
                f"Expected a directory with encoder.pkl and decoder.pkl, got no file {file}."
            )
        tensors |= {f"{part}.{name}": tensor for name, tensor in read_tensor_files(file).items()}
    return to_imported_model(from_tensors(path, tensors, image_size))


def from_tensors(path: Path, tensors: Tensors, image_size: int | None) -> LazyModel:
    """Return the model of all `tensors`. Raises ValueError, listing the tensors that are missing or unknown."""
    config = _config(path, tensors, image_size)
    rules = _rules(config)
    check_tensors_used(rules, tensors, path, _MODEL)
    return LazyModel(config, rules, tensors, path)


def _config(path: Path, tensors: Tensors, image_size: int | None) -> DVAEConfig:
    width = tensor_shape(tensors, "encoder.blocks.input.w", path, 4, _MODEL)[0]
    decoder_width, vocab = tensor_shape(tensors, "decoder.blocks.input.w", path, 4, _MODEL)[:2]
    groups = count_layers(tensors, "encoder.blocks.group_{}.block_1.res_path.conv_1.w", first=1)
    blocks = count_layers(tensors, "encoder.blocks.group_1.block_{}.res_path.conv_1.w", first=1)
    return DVAEConfig(
        image_size=image_size or 256, groups=groups, blocks=blocks,
        width=width, decoder_width=decoder_width, vocab=vocab,
    )  # fmt: skip


def _rules(cfg: DVAEConfig) -> dict[str, ParamRule]:
    rules: dict[str, ParamRule] = {}

    def add(to: str, source: str) -> None:
        rules[f"{to}/kernel"] = tensor_rule(f"{source}.w", transpose_conv)
        rules[f"{to}/bias"] = tensor_rule(f"{source}.b", identity)

    up = [cfg.width * 2**g for g in range(cfg.groups)]
    for part, in_width, widths in (("encoder", cfg.width, up), ("decoder", cfg.decoder_width, up[::-1])):
        add(f"{part}/input", f"{part}.blocks.input")
        add(f"{part}/output", f"{part}.blocks.output.conv")
        for g, width in enumerate(widths, 1):
            for b in range(1, cfg.blocks + 1):
                to, source = f"{part}/groups/group_{g}_block_{b}", f"{part}.blocks.group_{g}.block_{b}"
                if in_width != width:
                    add(f"{to}/id_path", f"{source}.id_path")
                for i in range(1, 5):
                    add(f"{to}/conv_{i}", f"{source}.res_path.conv_{i}")
                in_width = width
    return rules
