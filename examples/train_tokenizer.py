"""Train a dVAE on a folder of images with the Python API and save reconstructions.

python examples/train_tokenizer.py FOLDER --run runs/my_tokenizer
"""

import argparse

import numpy as np

from dalle_jax.config import DataConfig, DVAEConfig, OptimConfig, Schedule, TrainConfig
from dalle_jax.data.images import image_grid, save_png, to_uint8
from dalle_jax.data.sources import infer_source, open_source
from dalle_jax.pipelines import TokenizerPipeline, load
from dalle_jax.train import loop


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="images, or any other path that --data.path accepts")
    parser.add_argument("--run", default="runs/my_tokenizer")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(argv)

    config = TrainConfig(
        run=args.run,
        model=DVAEConfig(
            image_size=args.image_size,
            groups=3,  # two poolings: a quarter of the image size on each side of the grid of codes
            blocks=1,
            width=args.width,
            decoder_width=2 * args.width,
            vocab=512,
            tau=Schedule(start=1.0, end=0.3, steps=args.steps),  # temperature of the Gumbel-softmax
        ),
        data=DataConfig(source=infer_source(args.folder), batch_size=args.batch_size, crop="random"),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=min(100, args.steps)),
        steps=args.steps,
        eval_every=max(1, args.steps // 4),
        save_every=max(1, args.steps // 4),
        sample_every=args.steps,
        eval_rows=args.batch_size,
    )
    if not loop.train(config).finished:  # Ctrl-C: a second call with the same configuration resumes
        return

    tokenizer = load(args.run, TokenizerPipeline)
    rows = open_source(config.data.source, "eval", languages=())  # the held-out images
    images = np.stack([rows.image(i, args.image_size, "center") for i in range(min(8, len(rows)))])
    reconstructions = to_uint8(tokenizer.decode(tokenizer.encode(images)))
    save_png(
        f"{args.run}/reconstructions.png", image_grid(np.concatenate([images, reconstructions]), len(images))
    )


if __name__ == "__main__":
    main()
