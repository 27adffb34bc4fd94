"""Sample images for captions from a trained run and save them as one grid.

python examples/sample_images.py runs/demo/dalle "a large red star" "一个大的蓝色圆环" --guidance-scale 2
"""

import argparse

import numpy as np

from dalle_jax.data.images import image_grid, save_png
from dalle_jax.pipelines import ImageRequest, load


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run directory of a Transformer or diffusion model")
    parser.add_argument("captions", nargs="+")
    parser.add_argument("--num-images", type=int, default=4, help="per caption, with seeds 0, 1, ...")
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--out", default="grid.png")
    args = parser.parse_args(argv)

    model = load(args.run)
    requests = [
        ImageRequest(caption, seed=seed, guidance_scale=args.guidance_scale)
        for caption in args.captions
        for seed in range(args.num_images)
    ]
    results = []
    for result in model.sample(requests):  # in the order of the requests, as they are finished
        results.append(result)
        print(f"{len(results)}/{len(requests)} {result.request.prompt}")
    images = np.stack([result.image for result in results])  # uint8 (B, H, W, 3)
    labels = [result.request.prompt for result in results]
    save_png(args.out, image_grid(images, args.num_images, labels, scale=4))


if __name__ == "__main__":
    main()
