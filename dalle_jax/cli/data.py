"""`dalle-jax data`: what a data set holds, what of it cannot be used; building a TFDS data set."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dalle_jax.cli import output
from dalle_jax.cli.verbs import Data
from dalle_jax.data.build import build_tfds
from dalle_jax.data.images import BadImage
from dalle_jax.data.sources import Source, open_source, source_of
from dalle_jax.data.sources.rows import StoredRows
from dalle_jax.inference import Counter as Told


def data(args: Data) -> dict[str, Any]:
    """Reads every row of both splits and prints what is there."""
    if (args.to is None) != (args.out is None):
        raise ValueError("--to and --out go together: dalle-jax data PATH --to tfds --out DIR")
    source = source_of(args.path)
    if hasattr(source, "max_bad_share"):
        source = dataclasses.replace(source, max_bad_share=args.max_bad_share)
    opened: dict[str, Source] = {}
    for split in ("train", "eval"):
        try:
            opened[split] = open_source(source, split, languages=())
        except ValueError as error:
            if split == "train" or "split" not in str(error):
                raise
            print(f"no evaluation split: {str(error).splitlines()[0]}")
    captioned = {split: _captioned(source, split) or rows for split, rows in opened.items()}
    result: dict[str, Any] = {"kind": source.kind, "splits": {}}
    for split, rows in captioned.items():  # building decodes them as well
        found = _decode_all(rows) if args.to is None else Counter()
        result["splits"][split] = _about(rows, found)
    if args.to is not None:
        name = (
            re.sub(r"\W+", "_", Path(args.path.split(",")[0]).name.split(".")[0]).strip("_").lower() or "data"
        )
        names = {"train": "train", "eval": source.eval_split if source.kind != "scenes" else "test"}
        splits = {_split_name(names[s], s): rows for s, rows in captioned.items()}
        out = output.directory(args.out)
        where, left_out = build_tfds(name, splits, out, size=args.size, progress=Told("rows"))
        for split, causes in left_out.items():
            key = next(s for s in captioned if _split_name(names[s], s) == split)
            result["splits"][key] = _about(captioned[key], causes)
        result["built"] = str(where)
    for split, about in result["splits"].items():
        said = ", ".join(f"{n} {language}" for language, n in about["captions"].items()) or "none"
        print(
            f"{split}: {about['rows']} rows of {source.kind}; captions: {said}; classes: {about['classes']}"
        )
        for cause, count in sorted(about["unusable"].items(), key=lambda item: -item[1]):
            print(f"{count:9d}  {cause}")
    if "built" in result:
        eval_flag = next((n for n in splits if n != "train"), "train")
        print(f"built {where}; use it with --data.path {where} --data.source.eval-split {eval_flag}")
    return result


def _split_name(name: str, default: str) -> str:
    return name if re.fullmatch(r"\w+", name) else default


def _captioned(source: Any, split: str) -> Source | None:
    """The rows with captions, or None where none has any."""
    try:
        return open_source(source, split, languages=("en", "zh"))
    except ValueError:
        return None


def _decode_all(rows: Source) -> Counter[str]:
    told = Told("rows")
    found: Counter[str] = Counter()

    def check(i: int) -> str | None:
        try:
            rows.stored(i)
        except BadImage as error:
            return f"picture {error.cause}"
        return None

    if isinstance(rows, StoredRows):
        with ThreadPoolExecutor(2) as pool:
            for i, cause in enumerate(pool.map(check, range(len(rows)))):
                found.update([cause] if cause else [])
                told(i + 1, len(rows))
    return found


def _about(rows: Source, broken: Counter[str]) -> dict[str, Any]:
    captions: Counter[str] = Counter()
    for i in range(len(rows)):
        captions.update({language: len(texts) for language, texts in rows.captions(i).items()})
    unusable = Counter(rows.report()) + broken
    return {
        "rows": len(rows),
        "captions": dict(captions),
        "classes": len(rows.classes),
        "unusable": dict(unusable),
    }
