"""`dalle-jax data`: what a data set holds, what of it cannot be used, what its splits share; building a TFDS set."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from dalle_jax.cli import output
from dalle_jax.cli.common_args import JsonFlag, allow_bad_records, resolve_data
from dalle_jax.data import images
from dalle_jax.data.duplicates import ImagePool, find_duplicates, thumbnail
from dalle_jax.data.images import BadImageError
from dalle_jax.data.sources import Dataset, open_source
from dalle_jax.data.sources.dataset import StoredDataset
from dalle_jax.data.tfds_builder import build_tfds
from dalle_jax.pipelines import ProgressPrinter as Told

DRAWN = 1_000  # scenes whose captions are counted
PAIRS = 32  # pairs of pictures shown, those that differ most first


@dataclass(frozen=True, kw_only=True)
class DataArgs:
    """Tells what a folder of pictures, tar files, an npz file or a TFDS directory holds: rows of each split,
    captions, classes, and records that cannot be used, by cause. Every picture is decoded. Of a configuration or a
    run it is the data that it trains on, mixtures too.

    With --convert-to tfds it also builds a TFDS data set in array_record format, the same rows in the same order,
    without what cannot be used; no network and no TensorFlow."""

    path: Positional[Annotated[str, arg(metavar="PATH")]]
    """folder, tar files (commas, globs), npz file, TFDS directory or name; or a configuration file or run"""
    convert_to: Literal["tfds"] | None = None
    """format to build"""
    out: str | None = None
    """directory of the data set that is built, new or empty"""
    size: int | None = None
    """with --convert-to: store squares of this side, cropped to the centre; None stores the files as they are"""
    duplicates: str | None = None
    """look for evaluation pictures that training has too; directory for duplicates.jsonl and a grid of pairs"""
    max_bad_fraction: float = 1.0
    """share of unusable records above which to stop"""
    json: JsonFlag = False


def run(args: DataArgs) -> dict[str, Any]:
    """Reads every row of both splits and prints what is there."""
    if (args.convert_to is None) != (args.out is None):
        raise ValueError(
            "--convert-to and --out go together: dalle-jax data PATH --convert-to tfds --out DIR"
        )
    source = allow_bad_records(resolve_data(args.path).source, args.max_bad_fraction)
    opened: dict[str, Dataset] = {}
    for split in ("train", "eval"):
        try:
            opened[split] = open_source(source, split, languages=())
        except ValueError as error:
            if split == "train" or "split" not in str(error) or args.duplicates is not None:
                raise
            print(f"no evaluation split: {str(error).splitlines()[0]}")
    captioned = {split: _captioned(source, split) or rows for split, rows in opened.items()}
    result: dict[str, Any] = {"kind": source.kind, "splits": {}}
    for split, rows in captioned.items():  # building decodes them as well
        found = _decode_all(rows) if args.convert_to is None else Counter()
        result["splits"][split] = _about(rows, found)
    if args.duplicates is not None:
        result["duplicates"] = _duplicates(opened, output.directory(args.duplicates))
    if args.convert_to is not None:
        name = (
            re.sub(r"\W+", "_", Path(args.path.split(",")[0]).name.split(".")[0]).strip("_").lower() or "data"
        )
        names = {"train": "train", "eval": getattr(source, "eval_split", "test")}
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


def _captioned(source: Any, split: str) -> Dataset | None:
    """The rows with captions, or None where none has any."""
    try:
        return open_source(source, split, languages=("en", "zh"))
    except ValueError:
        return None


def _parts(rows: Dataset) -> Sequence[Dataset]:
    return getattr(rows, "parts", (rows,))


def _decode_all(rows: Dataset) -> Counter[str]:
    told, found = Told("rows"), Counter()
    pictures = ImagePool([rows])

    def check(i: int) -> str | None:
        try:
            pictures.stored(i)
        except BadImageError as error:
            return f"picture {error.cause}"
        return None

    with ThreadPoolExecutor(2) as pool:
        for i, cause in enumerate(pool.map(check, range(len(pictures)))):
            found.update([cause] if cause else [])
            told(i + 1, len(pictures))
    return found


def _about(rows: Dataset, broken: Counter[str]) -> dict[str, Any]:
    captions: Counter[str] = Counter()
    for part in _parts(rows):
        looked = range(len(part) if isinstance(part, StoredDataset) else min(len(part), DRAWN))
        for i in looked:  # of scenes, which are drawn, the first speak for all
            captions.update(
                {name: len(texts) * len(part) // len(looked) for name, texts in part.captions(i).items()}
            )
    unusable = Counter(rows.report()) | broken  # what is excluded is in both
    return {
        "rows": len(rows),
        "captions": dict(captions),
        "classes": len(rows.classes),
        "unusable": dict(unusable),
    }


def _duplicates(opened: dict[str, Dataset], out: Path) -> dict[str, Any]:
    """Writes duplicates.jsonl and, if there are any, duplicates.png; tells how many there are."""
    train, evaluation = ImagePool([opened["train"]]), ImagePool([opened["eval"]])
    found = find_duplicates(train, evaluation, progress=Told("pictures"))
    lines = [
        {"eval": evaluation.name(d.eval), "train": train.name(d.train), "exact": d.exact, "bits": d.bits,
         "difference": round(d.difference, 2)}
        for d in found
    ]  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (out / "duplicates.jsonl").write_text(text, encoding="utf-8")
    if shown := sorted(found, key=lambda d: -d.difference)[:PAIRS]:
        cells = [
            np.concatenate(
                [thumbnail(rows.stored(i), 96) for rows, i in ((evaluation, d.eval), (train, d.train))],
                axis=1,
            )
            for d in shown
        ]
        labels = ["same file" if d.exact else f"{d.bits} bits, {d.difference:.1f}" for d in shown]
        images.save_png(out / "duplicates.png", images.image_grid(np.stack(cells), 4, labels))
    exact = {d.eval for d in found if d.exact}
    near = {d.eval for d in found} - exact
    print(
        f"{len(evaluation)} evaluation pictures: {len(exact)} are in the training split as the same file, "
        f"{len(near)} as nearly the same picture; {out / 'duplicates.jsonl'}"
    )
    if found:
        print(f"to leave those out of training: --data.source.exclude {out / 'duplicates.jsonl'}")
    return {
        "exact": len(exact),
        "near": len(near),
        "evaluation": len(evaluation),
        "training": len(train),
        "training_duplicates": len({d.train for d in found}),
    }
