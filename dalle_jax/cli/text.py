"""`dalle-jax text train`: a vocabulary trained on the captions of a data set, and its statistics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from dalle_jax.cli import output
from dalle_jax.cli.common_args import JsonFlag, allow_bad_records, resolve_data
from dalle_jax.config import MixtureSource, SourceConfig
from dalle_jax.data.sources import open_source
from dalle_jax.data.sources.captions import iter_captions
from dalle_jax.text.tokenizers import TextTokenizer, tokenization_statistics, train_text_tokenizer

_MAX_MEASURED = 10_000  # captions of each language


@dataclass(frozen=True, kw_only=True)
class TextArgs:
    """Train a byte-pair vocabulary on the captions of a data set, for --text.tokenizer-path of train.py.

    Prints tokens per caption and per character in each language, and how many captions are longer than --text-len, on
    captions of the evaluation split if there is one."""

    action: Positional[Annotated[Literal["train"], arg(metavar="train")]]
    """what to do"""
    path: Positional[Annotated[str, arg(metavar="PATH")]]
    """folder, tar files (commas, globs), npz file, TFDS directory or name; or a configuration file or run"""
    out: str
    """file to write"""
    vocab: int = 16_384
    """largest number of pieces, 256 bytes among them"""
    captions: int = 200_000
    """captions to read, from rows spread evenly over the data set"""
    text_len: int = 256
    """text positions of the Transformer"""
    case: bool = False
    """keep upper case"""
    nfkc: bool = True
    """apply Unicode NFKC normalization, which maps compatible forms of a character to one"""
    json: JsonFlag = False


def run(args: TextArgs) -> dict[str, Any]:
    """Train a vocabulary, then measure it on captions that it was not trained on, if there are any."""
    if args.captions < 1 or args.text_len < 1:
        raise ValueError(
            f"Expected --captions and --text-len of at least 1, got {args.captions} and {args.text_len}."
        )
    out = output.output_file(args.out)
    source = allow_bad_records(resolve_data(args.path).source, 1.0)  # rows may lack one of the languages
    captions = list(iter_captions(open_source(source, "train"), args.captions))
    start = time.monotonic()
    train_text_tokenizer(captions, out, vocab=args.vocab, lowercase=not args.case, nfkc=args.nfkc)
    seconds = time.monotonic() - start
    tokenizer, languages = TextTokenizer.load(out), {}
    for language in ("en", "zh"):
        eval_captions = _read_eval_captions(source, language)
        if not eval_captions:
            continue
        counts = tokenization_statistics(tokenizer, eval_captions, text_len=args.text_len)
        languages[language] = counts
        print(
            f"{language}: {counts['captions']} held-out captions, {counts['tokens'] / counts['captions']:.2f} tokens "
            f"each, {counts['tokens'] / counts['characters']:.3f} per character; {counts['cut']} longer than "
            f"{args.text_len}"
        )
    print(
        f"{tokenizer.vocab_size} pieces from {len(captions)} captions in {seconds:.1f} s; next: --text.tokenizer-path "
        f"{out}"
    )
    return {
        "pieces": tokenizer.vocab_size,
        "captions": len(captions),
        "seconds": seconds,
        "languages": languages,
    }


def _read_eval_captions(source: SourceConfig, language: str) -> list[str]:
    """Read captions of the evaluation split in one language; of a mixture, from the parts that have some."""
    parts = source.parts if isinstance(source, MixtureSource) else (source,)
    captions: list[str] = []
    for part in parts:
        try:
            rows = open_source(part, "eval", languages=(language,))
        except ValueError:  # no evaluation split, or none in that language
            continue
        captions += iter_captions(rows, _MAX_MEASURED // len(parts))
    return captions
