"""The vocabulary of a stage that reads captions: given, taken over from another run, or trained on the source."""

from __future__ import annotations

import sys
from pathlib import Path

from dalle_jax.config import TrainConfig
from dalle_jax.data.sources import Dataset, iter_captions
from dalle_jax.text import tokenizers
from dalle_jax.train.initialize import copy_vocabulary


def make_text_tokenizer(config: TrainConfig, source: Dataset, path: Path, most: int) -> None:
    """Writes the vocabulary of `config` to `path`, with at most `most` pieces where it is trained; a file that is
    there stays. Raises what `TextTokenizer.load` and `text.train` raise."""
    if path.exists():
        return
    if config.text.tokenizer_path is not None:
        tokenizers.TextTokenizer.load(config.text.tokenizer_path).save(path)
    elif not copy_vocabulary(config, path):  # the weights of init_from know that one
        captions = iter_captions(source, config.text.num_train_captions)
        case = {"lowercase": config.text.lowercase, "nfkc": config.text.nfkc}
        tokenizers.train_text_tokenizer(captions, path, vocab=most, **case)


def warn_truncated(tokenizer: tokenizers.TextTokenizer, source: Dataset, room: int) -> None:
    """Says how many of a sample of captions are longer than the `room` pieces that the model reads; they are
    cut."""
    sample = list(iter_captions(source, 2_000))
    cut = tokenizers.caption_statistics(tokenizer, sample, text_len=room)["cut"]
    if cut:
        print(
            f"{cut} of {len(sample)} captions looked at are longer than the {room} tokens that model.text_len has room "
            "for, and are cut there",
            file=sys.stderr,
        )
