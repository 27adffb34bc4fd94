"""The job of `dalle-jax sample`: its manifest, and with --captions-file a resumable job of many images.

The file has one caption per line or, ending in .jsonl, one JSON object per line with `caption` and the settings that
differ from the flags. manifest.jsonl beside the images has the job in its first line, then one line for each finished
image. The same call again samples what is missing. Another call takes a directory of its own, is refused in the one
that --out names, or with --overwrite deletes the images first. Calls without --captions-file list their images at the
end and do not resume. Codes are kept in codes.npy until all images are finished, then in codes.npz.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle_jax.checkpoint.remote_dir import is_url
from dalle_jax.cli import output, startup
from dalle_jax.data import images
from dalle_jax.files.atomic import write_npz
from dalle_jax.pipelines import GeneratedImage, ImageRequest, Pipeline, ProgressPrinter, chunked

_SETTINGS = {"seed": int, "temperature": float, "top_p": float, "guidance_scale": float}
_DEFAULT_OUT = "samples"
_MAX_GRID_IMAGES = 64
_MANIFEST, _CODES = "manifest.jsonl", "codes.npy"
_IMAGE = re.compile(r"c\d{3,}_s\d{4,}\.png")
_OTHER_FILES = (_MANIFEST, _CODES, "codes.npz", "grid.png", "filmstrip.png")
_TRIM_EVERY = 1000  # images


class CaptionLine(NamedTuple):
    """A caption and the settings that its line sets."""

    caption: str
    settings: dict[str, Any]


class JobImage(NamedTuple):
    """An image of a job: its file, the caption as listed, the label under it, tokens of the prompt that the model does
    not read, and its request."""

    file: str
    caption: str
    label: str
    dropped: int
    request: ImageRequest


def read_captions_file(path: str) -> list[CaptionLine]:
    """Read the captions of a text or .jsonl file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, has no captions, or a line, which the message names, is not valid.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected UTF-8 in --captions-file {path}, got: {error}. Convert it.") from None
    except OSError as error:
        raise OSError(f"Expected a readable --captions-file, got {path}: {error.strerror}.") from error
    lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"Expected one caption per line in --captions-file {path}, got none.")
    if not path.endswith(".jsonl"):
        return [CaptionLine(line, {}) for _, line in lines]
    return [_parse_line(f"--captions-file {path}, line {i}", line) for i, line in lines]


def _parse_line(where: str, line: str) -> CaptionLine:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: Expected JSON, got: {error}.") from None
    if not isinstance(row, dict) or not isinstance(row.get("caption"), str):
        raise ValueError(
            f'{where}: Expected an object like {{"caption": "a red circle"}}, got {line[:60]!r}.'
        )
    settings = {}
    for name, value in row.items():
        if name == "caption":
            continue
        if name not in _SETTINGS:
            raise ValueError(f"{where}: Expected one of caption, {', '.join(_SETTINGS)}, got {name!r}.")
        if isinstance(value, bool) or not isinstance(value, (int, _SETTINGS[name])):
            kind = "an integer" if _SETTINGS[name] is int else "a number"
            raise ValueError(f"{where}: Expected {name} to be {kind}, got {value!r}.")
        settings[name] = _SETTINGS[name](value)
    return CaptionLine(row["caption"], settings)


class _OtherJobError(ValueError):
    """A directory has images of another job."""


class Manifest:
    """manifest.jsonl: the job, then a line for each finished image."""

    def __init__(self, path: Path, job: dict[str, Any], resume: bool = True):
        """Open or start the manifest; without `resume` no image is finished. Raises ValueError for another job."""
        self.path, self.done = path, set[str]()
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # a killed process may leave a part of a line
        if whole:
            first, *rest = (json.loads(line) for line in whole.splitlines())
            differing = sorted(k for k in {*first, *job} if first.get(k) != job.get(k))
            if differing:
                raise _OtherJobError(
                    f"Expected an --out that is new or of the same job, got {path.parent} of another job "
                    f"({', '.join(differing)} differ). Use --out DIR or --overwrite."
                )
            if not resume:
                whole, rest = b"", []
            self.done = {row["file"] for row in rest}
        self._file = open(path, "r+b" if content else "wb")  # noqa: SIM115, open as long as the job
        self._file.truncate(len(whole))
        self._file.seek(len(whole))
        if not whole:
            self._write(job)
            self._file.flush()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append the lines of finished images."""
        for row in rows:
            self._write(row)
            self.done.add(row["file"])
        self._file.flush()

    def rows(self) -> list[dict[str, Any]]:
        """Return the lines of all finished images."""
        return [json.loads(line) for line in self.path.read_bytes().splitlines()[1:]]

    def close(self) -> None:
        self._file.close()


def describe_job(
    run: str, pipeline: Pipeline, job_images: list[JobImage], config: Any, job: dict[str, Any]
) -> dict[str, Any]:
    """Return the first line of the manifest.

    Args:
        run: the run directory or its URL.
        pipeline: the model.
        job_images: all images of the job; with re-ranking the first candidate of each caption.
        config: of `pipeline.sample`.
        job: settings of the model and the call, beside those of the images.
    """
    settings = [image_settings(image.request, config) for image in job_images]
    listed = [
        [image.file, image.caption, *own.values()] for image, own in zip(job_images, settings, strict=True)
    ]
    return {
        "run": run if is_url(run) else str(pipeline.run.path),
        "step": pipeline.run.step,
        "num_images": len(job_images),
        "captions": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        **json.loads(json.dumps(job)),
    }


def open_manifest(out: str | None, job: dict[str, Any], *, overwrite: bool, resume: bool) -> Manifest:
    """Make the directory of a job and open its manifest.

    Args:
        out: the directory; None is samples, or the first of samples-2, samples-3, ... without images of another job.
        job: of `describe_job`.
        overwrite: delete the files of any job that are there.
        resume: keep the images that the manifest lists.

    Raises:
        ValueError: `out` is a file or has images of another job.
        OSError: it cannot be written.
    """
    if out is not None or overwrite:
        return _open_manifest_in(out or _DEFAULT_OUT, job, overwrite, resume)
    number = 1
    while True:
        try:
            name = _DEFAULT_OUT if number == 1 else f"{_DEFAULT_OUT}-{number}"
            return _open_manifest_in(name, job, overwrite, resume)
        except _OtherJobError:
            number += 1


def _open_manifest_in(out: str, job: dict[str, Any], overwrite: bool, resume: bool) -> Manifest:
    directory = output.output_directory(out)
    files = [path for path in directory.iterdir() if _IMAGE.fullmatch(path.name)]
    if overwrite:
        for path in [*files, *(directory / name for name in _OTHER_FILES)]:
            path.unlink(missing_ok=True)
    elif files and not (directory / _MANIFEST).exists():
        raise _OtherJobError(
            f"Expected an --out that is new or of the same job, got {directory} with images such as "
            f"{min(files).name} and without {_MANIFEST}. Use --out DIR or --overwrite."
        )
    manifest = Manifest(directory / _MANIFEST, job, resume)
    if not resume:
        (directory / _CODES).unlink(missing_ok=True)
    return manifest


def run_job(
    pipeline: Pipeline,
    job_images: list[JobImage],
    config: Any,
    out: str | None,
    job: dict[str, Any],
    *,
    overwrite: bool,
    batch_size: int,
    columns: int,
    list_images: bool,
) -> dict[str, Any]:
    """Sample the images of a job that its manifest does not list yet.

    Args:
        pipeline: the model.
        job_images: all images of the job.
        config: of `pipeline.sample`.
        out: the directory of the job, or None (`open_manifest`).
        job: of `describe_job`; resuming calls must share it.
        overwrite: delete the files of another job in `out`.
        batch_size: images computed at once.
        columns: of grid.png.
        list_images: return the lines of all images.

    Returns:
        What `--json` prints.

    Raises:
        ValueError: a request is not valid, or `out` has another job.
    """
    pipeline.sample(
        [image.request for image in job_images], config, batch_size=batch_size
    )  # checks all requests
    manifest = open_manifest(out, job, overwrite=overwrite, resume=True)
    directory = manifest.path.parent
    settings = [image_settings(image.request, config) for image in job_images]
    codes = _CodesFile(directory / _CODES, len(job_images), resume=bool(manifest.done))
    rows = [i for i, image in enumerate(job_images) if image.file not in manifest.done]
    if manifest.done:
        print(f"{len(manifest.done)} of {len(job_images)} images are finished already", file=sys.stderr)
    progress, last, first = ProgressPrinter("images"), None, True
    try:
        requests = [job_images[i].request for i in rows]
        stream = pipeline.sample(requests, config, batch_size=batch_size) if rows else iter(())
        for batch in chunked(zip(rows, stream, strict=True), batch_size):
            lines = []
            for i, generated in batch:
                image = job_images[i]
                images.save_png(directory / image.file, generated.image)
                codes.write(i, generated)
                row = {"file": image.file, "caption": image.caption, "seed": image.request.seed}
                lines.append({**row, **settings[i], "tokens_cut": image.dropped})
                last = generated
            codes.flush()
            before = len(manifest.done)
            manifest.add(lines)
            if first:
                print_first_image()
                first = False
            if before // _TRIM_EVERY < len(manifest.done) // _TRIM_EVERY:
                _release_memory()
            progress(len(manifest.done), len(job_images))
        results: dict[str, Any] = {"run": str(pipeline.run.path), "step": pipeline.run.step, "grid": None}
        names = [image.file for image in job_images]
        results |= codes.finish(names, pipeline)
        if len(job_images) <= _MAX_GRID_IMAGES:
            grid = output.LabeledGrid(directory / "grid.png", columns)
            pixels = [images.load_image(directory / name, pipeline.image_size) for name in names]
            grid.save(pixels, [image.label for image in job_images])
            results["grid"] = str(grid.path)
        print(f"{len(job_images)} images in {directory}, listed in {manifest.path}")
        if last is not None and last.codes_per_pass is not None:
            print(f"{last.codes_per_pass:.2f} codes per pass")
            results["codes_per_pass"] = last.codes_per_pass
        by_name = {row["file"]: row for row in manifest.rows()} if list_images else {}
        finished = [{**by_name[name], "file": str(directory / name)} for name in names] if list_images else []
        return {**results, "manifest": str(manifest.path), "images": finished}
    finally:
        manifest.close()


def image_settings(request: ImageRequest, config: Any) -> dict[str, Any]:
    """Return the settings of an image that its request may set, those of the call filled in."""
    settings = {}
    for name in ("temperature", "top_p", "guidance_scale"):
        own = getattr(request, name)
        if own is not None or hasattr(config, name):
            settings[name] = getattr(config, name) if own is None else own
    return settings


class _CodesFile:
    """The codes of finished images on disk: codes.npy, at the end codes.npz. No file for a model without codes."""

    def __init__(self, path: Path, rows: int, resume: bool):
        self._path, self._rows, self._resume = path, rows, resume
        self._array: np.ndarray | None = None

    def write(self, row: int, generated: GeneratedImage) -> None:
        if generated.codes is None:
            return
        if self._array is None:
            resumed = self._resume and self._path.exists()
            shape = (self._rows, len(generated.codes))
            self._array = (
                np.lib.format.open_memmap(self._path, mode="r+")
                if resumed
                else np.lib.format.open_memmap(self._path, mode="w+", dtype=np.int32, shape=shape)
            )
        self._array[row] = generated.codes

    def flush(self) -> None:
        if isinstance(self._array, np.memmap):
            self._array.flush()

    def finish(self, names: list[str], pipeline: Pipeline) -> dict[str, str]:
        """Write codes.npz and remove codes.npy; return the path for `--json`."""
        final = self._path.with_suffix(".npz")
        if self._array is None and self._path.exists():  # killed after the last image
            self._array = np.load(self._path)
        if self._array is not None and pipeline.tokenizer is not None:
            fingerprint = np.array(pipeline.tokenizer.fingerprint)
            write_npz(final, codes=self._array, names=np.array(names), tokenizer=fingerprint)
            os.unlink(self._path)
        return {"codes": str(final)} if final.exists() else {}


def print_first_image() -> None:
    """Print the time from the start of the process to the first image to standard error."""
    seconds = startup.seconds_since_start()
    print(f"the first image after {seconds:.1f} s, including start-up and compilation", file=sys.stderr)


def _release_memory() -> None:
    """Return freed memory to the system. glibc keeps the holes between its blocks: over a long job they grew by about
    10 MiB every 1,000 images while the memory in use stayed the same. Does nothing with another C library."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
