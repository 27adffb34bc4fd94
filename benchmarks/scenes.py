"""Speed of the procedural scenes and of their verifier, on one core: python -m benchmarks.scenes

Prints the CPU time of layout, caption and pixels, scenes per second with one caption each (English and Chinese in
turn), and verified images per second. Each value is the best of three rounds of CPU time, so other processes do not
count.
"""

from __future__ import annotations

import argparse
import time

from dalle_jax.data.scenes.generator import LANGUAGES, generate_scene, render_scene, scene_captions
from dalle_jax.evaluate.scenes.verifier import verify_scene


def seconds_per_call(fn, count: int) -> float:
    """Return the CPU seconds per call of fn(i), i < count, in the fastest of three rounds."""
    rounds = []
    for _ in range(3):
        start = time.process_time()
        for i in range(count):
            fn(i)
        rounds.append((time.process_time() - start) / count)
    return min(rounds)


def make_caption(s, i: int):
    """Return one caption of a scene, in English for even i and in Chinese for odd i."""
    return scene_captions(s, index=i, languages=LANGUAGES[i % 2 : i % 2 + 1])


def make_row(i: int, side: int) -> None:
    """Do the work of a data source for one row."""
    s = generate_scene(i)
    render_scene(s, side)
    make_caption(s, i)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="scenes")
    count = parser.parse_args().count
    scenes = [generate_scene(i) for i in range(count)]
    print(f"layout        {1e6 * seconds_per_call(generate_scene, count):6.0f} us")
    print(f"one caption   {1e6 * seconds_per_call(lambda i: make_caption(scenes[i], i), count):6.0f} us")
    for side in (32, 64, 128, 256):
        rows = count if side <= 64 else min(count, 200)
        pixels = seconds_per_call(lambda i, side=side: render_scene(scenes[i], side), rows)
        whole = seconds_per_call(lambda i, side=side: make_row(i, side), rows)
        print(
            f"{side:3} px pixels {1e6 * pixels:6.0f} us, all {1e6 * whole:6.0f} us = {1 / whole:.0f} scenes/s"
        )
    verified = min(count, 100)
    for side in (32, 64, 128):
        images = [render_scene(scenes[i], side) for i in range(verified)]
        facts = [make_caption(scenes[i], i)[0].facts for i in range(verified)]
        each = seconds_per_call(
            lambda i, images=images, facts=facts: verify_scene(images[i], facts[i]), verified
        )
        print(f"{side:3} px  verifier {1e3 * each:5.1f} ms = {1 / each:5.0f} images/s")


if __name__ == "__main__":
    main()
