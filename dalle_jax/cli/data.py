"""`dalle-jax data`: the contents of a data set, its unusable records and duplicates; building a TFDS data set."""

from __future__ import annotations

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from dalle_jax.cli import output
from dalle_jax.cli.common_args import JsonFlag, allow_bad_records, resolve_data
from dalle_jax.config import SourceConfig, StoredSource
from dalle_jax.data import images
from dalle_jax.data.duplicates import ImagePool, find_duplicates, thumbnail
from dalle_jax.data.images import BadImageError
from dalle_jax.data.sources import Dataset, Split, StoredDataset, open_source
from dalle_jax.data.tfds_builder import build_tfds
from dalle_jax.pipelines import ProgressPrinter

_MAX_SCENES = 1_000  # scenes whose captions are counted
_MAX_PAIRS = 32  # pairs of duplicates in the image grid, those that differ most first


@dataclass(frozen=True, kw_only=True)
class DataArgs:
    """Describe a folder of images, tar files, an npz file or a TFDS directory: rows of each split, captions, classes,
    and unusable records by cause. Every image is decoded. For a configuration or a run, the data that it trains on is
    described, mixtures too.

    With --convert-to tfds, also build a TFDS data set in array_record format: the same rows in the same order, without
    unusable records. Needs no network and no TensorFlow."""

    path: Positional[Annotated[str, arg(metavar="PATH")]]
    """folder, tar files (commas, globs), npz file, TFDS directory or name; or a configuration file or run"""
    convert_to: Literal["tfds"] | None = None
    """format to build"""
    out: str | None = None
    """directory of the data set to build, new or empty"""
    size: int | None = None
    """with --convert-to: store squares of this side, pixels, cropped to the center; None stores the files unchanged"""
    duplicates: str | None = None
    """find evaluation images that training also has; directory for duplicates.jsonl and a grid of pairs"""
    max_bad_fraction: float = 1.0
    """fraction of unusable records above which to stop"""
    json: JsonFlag = False


def run(args: DataArgs) -> dict[str, Any]:
    """Read every row of both splits and print a description."""
    if (args.convert_to is None) != (args.out is None):
        raise ValueError(
            "Expected --convert-to with --out, got one of them. Use dalle-jax data PATH --convert-to tfds --out DIR."
        )
    if args.size is not None and args.convert_to is None:
        raise ValueError(
            f"Expected --size with --convert-to, got --size {args.size} alone. "
            "Use dalle-jax data PATH --convert-to tfds --out DIR --size N."
        )
    source = allow_bad_records(resolve_data(args.path).source, args.max_bad_fraction)
    opened = _open_splits(source, require_eval=args.duplicates is not None)
    captioned = {split: _open_with_captions(source, split) or rows for split, rows in opened.items()}
    result: dict[str, Any] = {"kind": source.kind, "splits": {}}
    for split, rows in captioned.items():
        causes = _decode_all(rows) if args.convert_to is None else Counter()  # building decodes them as well
        result["splits"][split] = _describe(rows, causes)
    if args.duplicates is not None:
        result["duplicates"] = _find_duplicates(opened, output.output_directory(args.duplicates))
    built = None
    if args.out is not None:
        built, causes_of = _build(args.path, source, captioned, args.out, args.size)
        for split, causes in causes_of.items():
            result["splits"][split] = _describe(captioned[split], causes)
        result["built"] = str(built)
    for split, fields in result["splits"].items():
        captions = ", ".join(f"{n} {language}" for language, n in fields["captions"].items()) or "none"
        print(
            f"{split}: {fields['rows']} rows of {source.kind}; captions: {captions}; classes: {fields['classes']}"
        )
        for cause, count in sorted(fields["unusable"].items(), key=lambda item: -item[1]):
            print(f"{count:9d}  {cause}")
    if built is not None:
        names = _split_names(source)
        eval_split = names["eval"] if "eval" in captioned else names["train"]
        print(f"built {built}; use it with --data.path {built} --data.source.eval-split {eval_split}")
    return result


def _open_splits(source: SourceConfig, *, require_eval: bool) -> dict[Split, Dataset]:
    opened: dict[Split, Dataset] = {"train": open_source(source, "train", languages=())}
    try:
        opened["eval"] = open_source(source, "eval", languages=())
    except ValueError as error:
        if "split" not in str(error) or require_eval:
            raise
        print(f"no evaluation split: {str(error).splitlines()[0]}")
    return opened


def _open_with_captions(source: SourceConfig, split: Split) -> Dataset | None:
    """Return the rows with captions, or None if no row has any."""
    try:
        return open_source(source, split, languages=("en", "zh"))
    except ValueError:
        return None


def _split_names(source: SourceConfig) -> dict[Split, str]:
    """Return the names of the splits of the TFDS data set."""
    name = source.eval_split if isinstance(source, StoredSource) else "test"
    return {"train": "train", "eval": name if re.fullmatch(r"\w+", name) else "eval"}


def _build(
    path: str, source: SourceConfig, rows: dict[Split, Dataset], out: str, size: int | None
) -> tuple[Path, dict[Split, Counter[str]]]:
    """Build a TFDS data set; return its directory and the unusable records of each split, by cause."""
    name = re.sub(r"\W+", "_", Path(path.split(",")[0]).name.split(".")[0]).strip("_").lower() or "data"
    names = _split_names(source)
    splits = {names[split]: dataset for split, dataset in rows.items()}
    built, left_out = build_tfds(
        name, splits, output.output_directory(out), size=size, progress=ProgressPrinter("rows")
    )
    return built, {split: left_out[names[split]] for split in rows}


def _decode_all(rows: Dataset) -> Counter[str]:
    """Decode every stored image; return the number of those that do not decode, by cause."""
    progress, causes, pool = ProgressPrinter("rows"), Counter(), ImagePool([rows])

    def decode(i: int) -> str | None:
        try:
            pool.stored_image(i)
        except BadImageError as error:
            return error.cause
        return None

    with ThreadPoolExecutor(2) as threads:
        for i, cause in enumerate(threads.map(decode, range(len(pool)))):
            causes.update([cause] if cause else [])
            progress(i + 1, len(pool))
    return causes


def _describe(rows: Dataset, causes: Counter[str]) -> dict[str, Any]:
    captions: Counter[str] = Counter()
    for part in rows.parts:
        # The captions of scenes are estimated from the first ones.
        counted = len(part) if isinstance(part, StoredDataset) else min(len(part), _MAX_SCENES)
        for i in range(counted):
            for language, texts in part.captions(i).items():
                captions[language] += len(texts) * len(part) // counted
    unusable = Counter(rows.report()) | causes  # excluded records are in both
    return {
        "rows": len(rows),
        "captions": dict(captions),
        "classes": len(rows.classes),
        "unusable": dict(unusable),
    }


def _find_duplicates(opened: dict[Split, Dataset], out: Path) -> dict[str, Any]:
    """Write duplicates.jsonl and, if there are any, duplicates.png; return their numbers."""
    train, evaluation = ImagePool([opened["train"]]), ImagePool([opened["eval"]])
    duplicates = find_duplicates(train, evaluation, progress=ProgressPrinter("images"))
    lines = [
        {"eval": evaluation.name(d.eval), "train": train.name(d.train), "exact": d.exact, "bits": d.bits,
         "difference": round(d.difference, 2)}
        for d in duplicates
    ]  # fmt: skip
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (out / "duplicates.jsonl").write_text(text, encoding="utf-8")
    if pairs := sorted(duplicates, key=lambda d: -d.difference)[:_MAX_PAIRS]:
        cells = [
            np.concatenate(
                [thumbnail(pool.stored_image(i), 96) for pool, i in ((evaluation, d.eval), (train, d.train))],
                axis=1,
            )
            for d in pairs
        ]
        labels = ["same file" if d.exact else f"{d.bits} bits, {d.difference:.1f}" for d in pairs]
        images.save_png(out / "duplicates.png", images.image_grid(np.stack(cells), 4, labels))
    exact = {d.eval for d in duplicates if d.exact}
    near = {d.eval for d in duplicates} - exact
    print(
        f"{len(evaluation)} evaluation images: {len(exact)} are in the training split as the same file, {len(near)} as "
        f"nearly the same image; {out / 'duplicates.jsonl'}"
    )
    if duplicates:
        print(f"to leave those out of training: --data.source.exclude {out / 'duplicates.jsonl'}")
    return {
        "exact": len(exact),
        "near": len(near),
        "evaluation": len(evaluation),
        "training": len(train),
        "training_duplicates": len({d.train for d in duplicates}),
    }
