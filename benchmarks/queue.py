"""A long job through the queue, killed and begun again: nothing twice, nothing lost, memory, every picture its own.

    python -m benchmarks.queue runs/demo/dalle --count 10000 --batch 64

Writes captions of mixed lengths with seeds, guidance, temperature and top-p of their own, begins `dalle-jax sample
--captions-file`, ends it with SIGKILL when half of the pictures are listed, and gives the same command again. Then it
counts lines and files, looks whether a picture was written twice, and draws every N-th alone in a batch of one.
`--jacobi 8` has both calls draw several codes a pass; those that are drawn alone are drawn code by code.
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


def captions(path: Path, count: int) -> list[dict]:
    """Captions in English and Chinese, of one to all of their words or characters."""
    from dalle_jax.data.scenes import captions as scene_captions
    from dalle_jax.data.scenes import generator

    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        scene = generator.scene(i, max_objects=1, sizes=("large",), fills=("solid",), backgrounds=("plain",))
        text = scene_captions.captions(scene, index=i)[i % 2].text
        words, between = (text.split(), " ") if i % 2 == 0 else (list(text), "")
        rows.append({
            "caption": between.join(words[: rng.integers(1, len(words) + 1)]),
            "seed": int(rng.integers(2**32)),
            "temperature": float(rng.choice([0.4, 0.7, 1.0])),
            "top_p": float(rng.choice([0.9, 1.0])),
            "guidance": float(rng.choice([1.0, 1.5, 3.0])),
        })  # fmt: skip
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return rows


def listed(out: Path) -> list[str]:
    """Files of the whole lines of the manifest."""
    path = out / "manifest.jsonl"
    lines = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
    return [json.loads(line)["file"] for line in lines]


def counted(out: Path) -> int:
    """Whole lines of the manifest, but the first, which is the job."""
    path = out / "manifest.jsonl"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def resident(pid: int) -> float:
    """MiB of memory that the process has resident."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0  # it has just ended


def watched(command: list[str], out: Path, stop: int | None, every: int) -> None:
    """Runs the command, to `stop` pictures or to its end, and prints its memory after every so many pictures."""
    begin, told = time.perf_counter(), counted(out)
    print(f"begun with {told} pictures", flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        time.sleep(0.2)
        done = counted(out)
        if done >= told + every:
            told = done
            print(f"{done:6d} pictures, {time.perf_counter() - begin:6.1f} s, {resident(process.pid):5.0f} MiB",
                  flush=True)  # fmt: skip
        if stop is not None and done >= stop:
            process.kill()
    said, seconds = process.communicate()[0], time.perf_counter() - begin
    print(
        f"ended with {process.returncode} after {seconds:.1f} s, {len(listed(out))} pictures: {said.strip()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a Transformer on procedural scenes")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--jacobi", type=int, default=None)
    parser.add_argument("--alone", type=int, default=500, help="pictures that are drawn again by themselves")
    parser.add_argument("--every", type=int, default=1000, help="pictures between two looks at the memory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        job, out = Path(work) / "captions.jsonl", Path(work) / "out"
        rows = captions(job, args.count)
        command = [
            sys.executable, "-m", "dalle_jax", "sample", args.run, "--captions-file", str(job), "--n", "1",
            "--batch", str(args.batch), "--out", str(out),
        ]  # fmt: skip
        command += [] if args.jacobi is None else ["--jacobi", str(args.jacobi)]
        watched(command, out, args.count // 2, args.every)
        before = {name: os.stat(out / name).st_mtime_ns for name in listed(out)}
        watched(command, out, None, args.every)
        check(out, rows, before)
        alone(args.run, rows, np.load(out / "codes.npz")["codes"], max(1, args.count // args.alone))


def check(out: Path, rows: list[dict], before: dict[str, int]) -> None:
    names, files = listed(out), {path.name for path in out.glob("c*.png")}
    again = sum(os.stat(out / name).st_mtime_ns != when for name, when in before.items())
    print(
        f"{len(rows)} asked for, {len(names)} lines in the manifest, {len(set(names))} different, {len(files)} "
        f"pictures, {len(files ^ set(names))} of them in one of both only, {again} of the first {len(before)} written "
        "again"
    )


def alone(run: str, rows: list[dict], codes: np.ndarray, step: int) -> None:
    from dalle_jax.pipelines import SamplingConfig, load_text_to_image, sample_code_rows

    model, same, which = load_text_to_image(run), 0, range(0, len(rows), step)
    for i in which:
        row = rows[i]
        how = SamplingConfig(
            temperature=row["temperature"], top_p=row["top_p"], guidance_scale=row["guidance"]
        )
        (found,) = sample_code_rows(model, [row["caption"]], [row["seed"]], how, batch=1)
        same += bool((found == codes[i]).all())
    print(f"{same} of {len(which)} drawn alone are the same, code for code")


if __name__ == "__main__":
    main()
