"""`dalle-jax text train`: a vocabulary from the captions of a data set, and what it makes of them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from dalle_jax.cli import output
from dalle_jax.cli.common_args import JsonFlag, allow_bad_records, resolve_data
from dalle_jax.config import MixtureSource, SourceConfig
from dalle_jax.data.sources import iter_captions, open_source
from dalle_jax.text.tokenizers import TextTokenizer, caption_statistics, train_text_tokenizer

_MEASURED = 10_000  # captions of each language


@dataclass(frozen=True, kw_only=True)
class TextArgs:
    """Trains a byte-pair vocabulary on the captions of a data set, for --text.tokenizer-path of a Transformer.

    Prints tokens per caption and per character in each language, on captions of the evaluation split where
    there is one, and how many captions are longer than --text-len."""

    action: Positional[Annotated[Literal["train"], arg(metavar="train")]]
    """what to do"""
    path: Positional[Annotated[str, arg(metavar="PATH")]]
    """folder, tar files (commas, globs), npz file, TFDS directory or name; or a configuration file or run"""
    out: str
    """file to write"""
    vocab: int = 16_384
    """most pieces, among them 256 bytes"""
    captions: int = 200_000
    """captions to read, from rows spread evenly over the data set"""
    text_len: int = 256
    """tokens that the Transformer will read of a caption"""
    case: bool = False
    """keep upper case"""
    nfkc: bool = True
    """fold compatible forms of a character into one"""
    json: JsonFlag = False


def run(args: TextArgs) -> dict[str, Any]:
    """Trains, then measures on captions that the vocabulary was not trained on where there are some."""
    if args.captions < 1 or args.text_len < 1:
        raise ValueError(f"--captions {args.captions}, --text-len {args.text_len}; want at least 1 each")
    out = output.file(args.out)
    source = allow_bad_records(resolve_data(args.path).source, 1.0)  # rows may lack one of the languages
    captions = list(iter_captions(open_source(source, "train"), args.captions))
    begin = time.monotonic()
    train_text_tokenizer(captions, out, vocab=args.vocab, lowercase=not args.case, nfkc=args.nfkc)
    seconds = time.monotonic() - begin
    tokenizer, languages = TextTokenizer.load(out), {}
    for language in ("en", "zh"):
        held_out = _held_out(source, language)
        if not held_out:
            continue
        found = caption_statistics(tokenizer, held_out, text_len=args.text_len)
        languages[language] = found
        print(
            f"{language}: {found['captions']} held-out captions, {found['tokens'] / found['captions']:.2f} tokens "
            f"each, {found['tokens'] / found['characters']:.3f} per character; {found['cut']} longer than "
            f"{args.text_len}"
        )
    print(
        f"{tokenizer.vocab_size} pieces from {len(captions)} captions in {seconds:.1f} s; next: --text.tokenizer-path {out}"
    )
    return {
        "pieces": tokenizer.vocab_size,
        "captions": len(captions),
        "seconds": seconds,
        "languages": languages,
    }


def _held_out(source: SourceConfig, language: str) -> list[str]:
    """Captions of the evaluation split in one language; of a mixture, from the parts that have some."""
    parts = source.parts if isinstance(source, MixtureSource) else (source,)
    captions: list[str] = []
    for part in parts:
        try:
            rows = open_source(part, "eval", languages=(language,))
        except ValueError:  # no evaluation split, or not in that language
            continue
        captions += iter_captions(rows, _MEASURED // len(parts))
    return captions
