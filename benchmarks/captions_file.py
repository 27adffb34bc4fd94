"""A long job of `dalle-jax sample --captions-file`, killed and resumed: completeness, memory, independence of requests.

    python -m benchmarks.captions_file runs/demo/dalle --count 10000 --batch 64

Writes captions of mixed lengths, each with its own seed, guidance, temperature and top-p, starts the command, kills it
with SIGKILL when half of the images are listed, and runs the same command again. Then it compares manifest and files,
counts images that were written twice, and samples every N-th image alone in a batch of one. With `--draft-len 8` both
commands use speculative decoding; the images sampled alone do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def write_requests(path: Path, count: int) -> list[dict]:
    """Write requests with captions in English and Chinese, cut to one to all of their words or characters."""
    from dalle_jax.data.scenes import captions as scene_captions
    from dalle_jax.data.scenes import generator

    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        scene = generator.generate_scene(
            i, max_objects=1, sizes=("large",), fills=("solid",), backgrounds=("plain",)
        )
        text = scene_captions.scene_captions(scene, index=i)[i % 2].text
        words, between = (text.split(), " ") if i % 2 == 0 else (list(text), "")
        rows.append({
            "caption": between.join(words[: rng.integers(1, len(words) + 1)]),
            "seed": int(rng.integers(2**32)),
            "temperature": float(rng.choice([0.4, 0.7, 1.0])),
            "top_p": float(rng.choice([0.9, 1.0])),
            "guidance_scale": float(rng.choice([1.0, 1.5, 3.0])),
        })  # fmt: skip
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return rows


def listed_files(out: Path) -> list[str]:
    """Return the files in complete lines of the manifest."""
    path = out / "manifest.jsonl"
    lines = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
    return [json.loads(line)["file"] for line in lines]


def count_lines(out: Path) -> int:
    """Return the number of complete lines of the manifest after the first, which describes the job."""
    path = out / "manifest.jsonl"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0  # the process has just ended


def run_command(command: list[str], out: Path, stop: int | None, every: int) -> None:
    """Run the command to its end, or kill it after `stop` images; print its memory after every `every` images."""
    begin, printed = time.perf_counter(), count_lines(out)
    print(f"starting with {printed} images", flush=True)
    killed = False
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        time.sleep(0.2)
        done = count_lines(out)
        if done >= printed + every:
            printed = done
            print(f"{done:6d} images, {time.perf_counter() - begin:6.1f} s, {resident_mib(process.pid):5.0f} MiB",
                  flush=True)  # fmt: skip
        if stop is not None and done >= stop:
            killed = True
            process.kill()
    output, seconds = process.communicate()[0], time.perf_counter() - begin
    print(
        f"ended with {process.returncode} after {seconds:.1f} s, {len(listed_files(out))} images: {output.strip()}"
    )
    if process.returncode and not killed:
        sys.exit("benchmarks.captions_file: error: the command failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="Transformer on procedural scenes")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--draft-len", type=int, default=None)
    parser.add_argument("--alone", type=int, default=500, help="images that are sampled again alone")
    parser.add_argument("--every", type=int, default=1000, help="images between two readings of the memory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        job, out = Path(work) / "captions.jsonl", Path(work) / "out"
        rows = write_requests(job, args.count)
        command = [
            sys.executable, "-m", "dalle_jax", "sample", args.run, "--captions-file", str(job), "--num-images", "1",
            "--batch-size", str(args.batch), "--out", str(out),
        ]  # fmt: skip
        command += [] if args.draft_len is None else ["--draft-len", str(args.draft_len)]
        run_command(command, out, args.count // 2, args.every)
        before = {name: os.stat(out / name).st_mtime_ns for name in listed_files(out)}
        run_command(command, out, None, args.every)
        check_files(out, rows, before)
        check_alone(args.run, rows, np.load(out / "codes.npz")["codes"], max(1, args.count // args.alone))


def check_files(out: Path, rows: list[dict], before: dict[str, int]) -> None:
    """Compare the manifest with the files, and count images that were written twice."""
    names, files = listed_files(out), {path.name for path in out.glob("c*.png")}
    rewritten = sum(os.stat(out / name).st_mtime_ns != when for name, when in before.items())
    print(
        f"{len(rows)} requests, {len(names)} lines in the manifest, {len(set(names))} different, {len(files)} images, "
        f"{len(files ^ set(names))} of them in only one of the two, {rewritten} of the first {len(before)} "
        "written again"
    )


def check_alone(run: str, rows: list[dict], codes: np.ndarray, step: int) -> None:
    """Sample every `step`-th image alone and compare its codes."""
    from dalle_jax.pipelines import ImageRequest, TextToImagePipeline, load

    model, equal, indices = load(run, TextToImagePipeline), 0, range(0, len(rows), step)
    for i in indices:
        row = dict(rows[i])
        (alone,) = model.sample([ImageRequest(row.pop("caption"), **row)], batch_size=1)
        equal += bool((alone.codes == codes[i]).all())
    print(f"{equal} of {len(indices)} images sampled alone are equal, code for code")


if __name__ == "__main__":
    main()
