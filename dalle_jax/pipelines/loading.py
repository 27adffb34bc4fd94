"""Trained models from run directories: a frozen image tokenizer, a Transformer with all that it draws with."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax

from dalle_jax.checkpoint.layout import CONFIG_FILE, IMAGE_TOKENIZER_DIR
from dalle_jax.checkpoint.load import Run, load_run
from dalle_jax.checkpoint.params_file import fingerprint
from dalle_jax.checkpoint.remote_dir import local_dir
from dalle_jax.checkpoint.run_dir import read_config
from dalle_jax.config import ClipConfig, TokenizerConfig, TransformerConfig
from dalle_jax.text.tokenizers import TextTokenizer
from dalle_jax.typing import Params


class ImageTokenizer(NamedTuple):
    """A frozen image tokenizer. fingerprint: changes with any of its parameters (`checkpoint.params_file.fingerprint`)."""

    config: TokenizerConfig
    params: Params
    fingerprint: str


class TextToImage(NamedTuple):
    """A trained Transformer with the vocabulary and the image tokenizer that it was trained on."""

    run: Run
    text: TextTokenizer
    tokenizer: ImageTokenizer

    @property
    def config(self) -> TransformerConfig:
        return self.run.config.model


def load_image_tokenizer(path: str | Path) -> ImageTokenizer:
    """The image tokenizer of a run: a tokenizer run itself, or the copy that a Transformer run keeps.

    Raises FileNotFoundError, ValueError or OSError as `load_run` does.
    """
    path = local_dir(path)
    model = read_config(path).model
    if isinstance(model, ClipConfig):
        raise ValueError(f"{path} is a run of stage clip: it has no image tokenizer; give a run that has one")
    if not isinstance(model, TokenizerConfig):
        path = path / IMAGE_TOKENIZER_DIR
        if not (path / CONFIG_FILE).is_file():
            raise FileNotFoundError(
                f"{path} does not exist yet; train the run first, or give the tokenizer's own run"
            )
    run = load_run(path)
    return ImageTokenizer(run.config.model, run.params, fingerprint(run.config.model, run.params))


def host_device() -> jax.Device:
    """The processor as a device of jax; the first device where jax was told to leave it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def load_text_to_image(path: str | Path, *, on_host: bool = False) -> TextToImage:
    """The Transformer of a run directory, ready to draw.

    on_host: its float32 parameters stay in the memory of the host, for a program that draws and does not measure:
    what draws is prepared there, and only that goes to the device.
    Raises FileNotFoundError for a run that is missing or has no checkpoint, ValueError for a run of another
    stage, OSError for files that cannot be read.
    """
    path = local_dir(path)
    kind = read_config(path).model.kind
    if kind == "clip":
        raise ValueError(
            f"{path} is a run of stage clip: it ranks pictures and draws none. Give the run of a Transformer, and this "
            f"one as --clip {path}"
        )
    if kind not in ("dalle", "bart", "dvae", "vqgan"):
        raise ValueError(f"{path} is a run of stage {kind}, want one of a Transformer")
    if kind not in ("dalle", "bart"):
        raise ValueError(
            f"{path} is a tokenizer run (stage {kind}): it knows no captions. Give the run of a Transformer "
            f"trained on it (--image-tokenizer {path}); `encode` and `decode` work with tokenizer runs"
        )
    run = load_run(path, device=host_device() if on_host else None)
    return TextToImage(run, TextTokenizer.load(path / "text_tokenizer.model"), load_image_tokenizer(path))
