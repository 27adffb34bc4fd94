"""`dalle-jax sample --captions-file`: pictures for a file of captions through a queue; a killed call goes on.

The file has one caption a line, or, ending in .jsonl, one JSON object a line with `caption` and what differs from
the flags: seed, temperature, top_p, guidance. Beside the pictures stands manifest.jsonl: first the job, then one
line for each picture that is whole. The same call again reads it and draws what is missing; another call is
refused there. Codes are kept in codes.npy until all are drawn, then in codes.npz.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dalle_jax.cli import output
from dalle_jax.data import images
from dalle_jax.data.images import to_uint8
from dalle_jax.files.atomic import write_npz
from dalle_jax.pipelines import (
    ProgressPrinter,
    SamplingConfig,
    TextToImage,
    check_null,
    decode_codes,
    make_batcher,
    tokenize_captions,
)
from dalle_jax.sampling.batcher import SamplingRequest

if TYPE_CHECKING:
    from dalle_jax.cli.sample import SampleArgs

_OWN = {
    "seed": int,
    "temperature": float,
    "top_p": float,
    "guidance_scale": float,
}  # what a line may say by itself


class CaptionRequest(NamedTuple):
    """One line: a caption, and what it says beside it."""

    caption: str
    own: dict[str, Any]


class OutputImage(NamedTuple):
    """One picture of the job and how it is drawn."""

    file: str
    caption: str
    seed: int
    sampling: SamplingConfig


def read_requests(path: str) -> list[CaptionRequest]:
    """The captions of a file. Raises OSError or ValueError, naming the line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--captions-file {path} is not UTF-8: {error}; convert it") from None
    except OSError as error:
        raise OSError(f"cannot read --captions-file {path}: {error.strerror}") from error
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"--captions-file {path} has no captions; want one a line")
    if not path.endswith(".jsonl"):
        return [CaptionRequest(line, {}) for _, line in lines]
    return [_parsed(f"--captions-file {path}, line {i}", line) for i, line in lines]


def _parsed(where: str, line: str) -> CaptionRequest:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("caption"), str):
        raise ValueError(f'{where} has no caption; want an object like {{"caption": "a red circle"}}')
    own = {k: v for k, v in row.items() if k != "caption"}
    for name, value in own.items():
        if name not in _OWN:
            raise ValueError(f"{where} has {name!r}; want caption, {', '.join(_OWN)}")
        if isinstance(value, bool) or not isinstance(value, (int, _OWN[name])):
            raise ValueError(f"{where}: {name} is {value!r}; want a number")
    return CaptionRequest(row["caption"], own)


def output_images(
    asked: list[CaptionRequest], n: int, seed: int, sampling: SamplingConfig
) -> list[OutputImage]:
    """All pictures of the job, n for each caption, with the names that `sample` gives them."""
    found = []
    for j, (caption, own) in enumerate(asked):
        first = own.get("seed", seed)
        changed = {name: float(value) for name, value in own.items() if name != "seed"}
        try:
            mine = dataclasses.replace(sampling, **changed)
        except ValueError as error:
            raise ValueError(f"caption {j} ({caption!r:.60}): {error}") from None
        if not (first >= 0 and first + n <= 2**32):
            raise ValueError(f"caption {j} has seeds from {first}; want integers in [0, 2**32)")
        for i in range(n):
            found.append(OutputImage(f"c{j:03d}_s{first + i:04d}.png", caption, first + i, mine))
    return found


class Manifest:
    """The file that says what is done. Raises ValueError where it is of another job."""

    def __init__(self, path: Path, job: dict[str, Any]):
        self.path, self.done = path, set[str]()
        kept = path.read_bytes() if path.exists() else b""
        whole = kept[: kept.rfind(b"\n") + 1]  # a line that was cut by the end of the process is not one
        if whole:
            first, *rest = (json.loads(line) for line in whole.splitlines())
            differs = sorted(k for k in {*first, *job} if first.get(k) != job.get(k))
            if differs:
                raise ValueError(
                    f"--out {path.parent} holds another job ({', '.join(differs)} differ): give another --out"
                )
            self.done = {row["file"] for row in rest}
        self._file = open(path, "r+b" if kept else "wb")  # noqa: SIM115, open as long as the job
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not whole:
            self._write(job)

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")

    def add(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._write(row)
            self.done.add(row["file"])
        self._file.flush()

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_bytes().splitlines()[1:]]

    def close(self) -> None:
        self._file.close()


def sample_file(
    args: SampleArgs,
    asked: list[CaptionRequest],
    model: TextToImage,
    sampling: SamplingConfig,
    prefix: np.ndarray | None,
    told: Callable[[int], None],
) -> dict[str, Any]:
    """Draws what the manifest does not have yet. `told` is called with the number of the first pictures."""
    if args.batch_size < 1:
        raise ValueError(f"batch is {args.batch_size}; want at least 1 picture at once")
    cfg, wanted = model.config, output_images(asked, args.num_images, args.seed, sampling)
    texts = tokenize_captions(model, [caption for caption, _ in asked])
    for row, picture in enumerate(wanted[:: args.num_images]):
        check_null(model, texts[row : row + 1], picture.sampling.guidance_scale)
    guided = any(p.sampling.guidance_scale != 1 for p in wanted)
    queue = make_batcher(model, args.batch_size * (2 if guided else 1), sampling)
    out = output.directory(args.out)
    prime = np.zeros(0, np.int32) if prefix is None else np.asarray(prefix, np.int32)
    about = [
        [p.file, p.caption, p.sampling.temperature, p.sampling.top_p, p.sampling.guidance_scale]
        for p in wanted
    ]
    job = {
        "run": str(model.run.path), "step": model.run.step, "tokenizer": model.tokenizer.fingerprint,
        "top_k": sampling.top_k, "quantization": sampling.quantization, "pictures": len(wanted),
        "captions": hashlib.sha256(json.dumps(about).encode()).hexdigest(),
        "prefix": hashlib.sha256(prime.tobytes()).hexdigest() if len(prime) else None,
    }  # fmt: skip
    manifest = Manifest(out / "manifest.jsonl", job)
    codes = _codes(out / "codes.npy", len(wanted), cfg.num_codes, fresh=not manifest.done)
    left = iter([i for i, p in enumerate(wanted) if p.file not in manifest.done])
    before, row_of, progress, first = len(manifest.done), {}, ProgressPrinter("pictures"), True
    trimmed = before
    if before:
        print(f"{before} of {len(wanted)} pictures are there already", file=sys.stderr)
    try:
        while True:
            while len(queue) < 2 * queue.num_slots and (row := next(left, None)) is not None:
                own = wanted[row].sampling
                request = SamplingRequest(
                    texts[row // args.num_images], wanted[row].seed, own.temperature,
                    1.0 if own.top_p is None else own.top_p, own.guidance_scale, prime,
                )  # fmt: skip
                row_of[queue.submit(request)] = row
            if not len(queue):
                break
            finished = queue.step()
            rows = [row_of.pop(ticket) for ticket, _ in finished]
            for start in range(0, len(rows), args.batch_size):
                _finish(model, args, out, wanted, rows[start : start + args.batch_size],
                        [c for _, c in finished[start : start + args.batch_size]], codes, manifest)  # fmt: skip
            if len(manifest.done) - trimmed >= TRIM_EVERY:
                trimmed = len(manifest.done)
                _give_back()
            if first and rows:
                told(len(rows))
                first = False
            progress(len(manifest.done), len(wanted))
        faster = {}
        if sampling.draft_len is not None and queue.codes_per_pass is not None:
            faster = {"codes_per_pass": queue.codes_per_pass}
            print(f"{queue.codes_per_pass:.2f} codes a pass")
        return {**_end(args, out, wanted, codes, manifest, model), **faster}
    finally:
        manifest.close()


TRIM_EVERY = 1000  # pictures


def _give_back() -> None:
    """Returns freed memory to the system. glibc keeps the holes between its blocks: those of a long job grew by about
    10 MiB every 1,000 pictures while what was in use stayed the same. Does nothing with another C library."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _codes(path: Path, rows: int, columns: int, *, fresh: bool) -> np.ndarray:
    """The array on disk that finished codes are written to."""
    if path.exists() and not fresh:
        return np.lib.format.open_memmap(path, mode="r+")
    done = path.with_suffix(".npz")
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=(rows, columns))
    if not fresh and done.exists():  # all had been drawn
        with np.load(done) as file:
            array[:] = file["codes"]
    return array


def _finish(model, args, out, wanted, rows, codes, kept, manifest) -> None:
    """Picture, codes, then the line in the manifest: what has a line is whole."""
    short = args.batch_size - len(rows)
    shown = to_uint8(
        decode_codes(model.tokenizer, np.stack([*codes, *[codes[-1]] * short]), batch=args.batch_size)
    )
    lines = []
    for row, own, picture in zip(rows, codes, shown, strict=False):
        images.save_png(out / wanted[row].file, picture)
        kept[row] = own
        said = wanted[row].sampling
        lines.append({
            "file": wanted[row].file, "caption": wanted[row].caption, "seed": wanted[row].seed,
            "temperature": said.temperature, "top_p": said.top_p, "guidance_scale": said.guidance_scale,
            "tokens_cut": max(0, model.text.count_tokens(wanted[row].caption) - model.config.text_len),
        })  # fmt: skip
    kept.flush()
    manifest.add(lines)


GRID_MOST = 64  # pictures in one grid


def _end(args, out, wanted, codes, manifest, model) -> dict[str, Any]:
    names = [p.file for p in wanted]
    made_by = np.array(model.tokenizer.fingerprint)
    write_npz(out / "codes.npz", codes=codes, names=np.array(names), tokenizer=made_by)
    os.unlink(out / "codes.npy")
    result = {"run": str(model.run.path), "step": model.run.step, "grid": None}
    if len(wanted) <= GRID_MOST:
        shown = np.stack([images.load_image(out / name, model.tokenizer.config.image_size) for name in names])
        columns, scale = (
            min(len(wanted), 8) if args.num_images == 1 else args.num_images,
            max(1, 128 // shown.shape[1]),
        )
        labels = [p.caption or "(no caption)" for p in wanted]
        images.save_png(out / "grid.png", images.image_grid(shown, columns, labels=labels, scale=scale))
        result["grid"] = str(out / "grid.png")
    print(f"{len(wanted)} pictures in {out}, listed in {manifest.path}")
    rows = {row["file"]: row for row in manifest.rows()} if args.json else {}
    listed = [{**rows[name], "file": str(out / name)} for name in names] if args.json else []
    return {
        **result,
        "codes": str(out / "codes.npz"),
        "manifest": str(manifest.path),
        "pictures": listed,
    }
