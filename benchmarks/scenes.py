"""Speed of the embedded data set and of the verifier, on one core.

    python -m benchmarks.scenes

Prints scenes per second (layout, pixels and one caption, in turns English and Chinese) and pictures read per
second, by CPU time, the best of three rounds: other programs on the machine do not count."""

import time

from dalle_jax.data.scenes.generator import LANGUAGES, captions, render, scene
from dalle_jax.evaluate.scenes.verifier import verify


def seconds(work, count: int) -> float:
    """CPU seconds per call of work(i), i < count, in the fastest of three rounds."""
    rounds = []
    for _ in range(3):
        start = time.process_time()
        for i in range(count):
            work(i)
        rounds.append((time.process_time() - start) / count)
    return min(rounds)


def words(s, i: int):
    """One caption of a scene, in turns English and Chinese."""
    return captions(s, index=i, languages=LANGUAGES[i % 2 : i % 2 + 1])


def sample(i: int, side: int) -> None:
    """What a data source does for one row."""
    s = scene(i)
    render(s, side)
    words(s, i)


def main() -> None:
    count = 2000
    scenes = [scene(i) for i in range(count)]
    print(f"layout        {1e6 * seconds(scene, count):6.0f} us")
    print(f"one caption   {1e6 * seconds(lambda i: words(scenes[i], i), count):6.0f} us")
    for side in (32, 64, 128, 256):
        rows = count if side <= 64 else 200
        pixels = seconds(lambda i, side=side: render(scenes[i], side), rows)
        whole = seconds(lambda i, side=side: sample(i, side), rows)
        print(
            f"{side:3} px pixels {1e6 * pixels:6.0f} us, all {1e6 * whole:6.0f} us = {1 / whole:.0f} scenes/s"
        )
    for side in (32, 64, 128):
        images = [render(scenes[i], side) for i in range(100)]
        facts = [words(scenes[i], i)[0].facts for i in range(100)]
        each = seconds(lambda i, images=images, facts=facts: verify(images[i], facts[i]), 100)
        print(f"{side:3} px  verifier {1e3 * each:5.1f} ms = {1 / each:5.0f} pictures/s")


if __name__ == "__main__":
    main()
