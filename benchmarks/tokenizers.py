"""Comparison of image tokenizers with equal parameters, codes, images and updates, on the scenes of the demo.

    python -m benchmarks.tokenizers --out runs/tokenizers [--only vqgan restarts] [--steps 1500] [--lpips FILE.npz]
        [--fid-weights FILE.npz]

Trains four tokenizers with 8 x 8 codes of 128 for images of 32 x 32 pixels; a stopped command resumes. Prints a table
for held-out images: PSNR, codebook use and perplexity, the fraction of reconstructions that the verifier reads
correctly, with --lpips the LPIPS distance, and with --fid-weights the FID of reconstructions (docs/evaluation.md; it is
comparable only for equal numbers of images). OUT/tokenizers.png shows the same images from each. All train without a
discriminator, so that only the codes differ; the VQGAN architecture has a learned codebook (`vqgan`), a codebook with
restarts of unused codes (`restarts`), and finite scalar quantization (`fsq`; Mentzer et al. 2023, 2309.15505).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import FiniteScalarQuantizer, Schedule, TrainConfig, VectorQuantizer, VQGANConfig
from dalle_jax.config.files import load_shipped_config
from dalle_jax.data import images
from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import inception, metrics
from dalle_jax.models import lpips
from dalle_jax.models import tokenizer as tokenizers
from dalle_jax.pipelines import TokenizerPipeline, load
from dalle_jax.train import loop


def make_configs(out: Path, steps: int) -> dict[str, TrainConfig]:
    """Return the four runs, whose numbers of parameters differ by at most 1%."""
    demo = load_shipped_config("demo_dvae")
    tau = Schedule(start=1.0, end=0.3, steps=steps)
    convolutional = VQGANConfig(
        image_size=32, width=16, channel_multipliers=(1, 2, 2), blocks=1, attention_levels=(2,), latent_width=32,
        quantizer=VectorQuantizer(vocab=128, dim=8, normalize=True), adversarial=None,
    )  # fmt: skip
    models = {
        "dvae": dataclasses.replace(demo.model, width=40, decoder_width=32, tau=tau),
        "vqgan": convolutional,
        "restarts": dataclasses.replace(
            convolutional, quantizer=dataclasses.replace(convolutional.quantizer, dead_code_restart_steps=20)
        ),
        "fsq": dataclasses.replace(convolutional, quantizer=FiniteScalarQuantizer(levels=(8, 4, 4))),
    }
    learning_rates = {"dvae": demo.optim.learning_rate}
    interval = max(1, steps // 4)
    return {
        name: dataclasses.replace(
            demo, run=str(out / name), model=model, steps=steps, eval_every=interval, save_every=interval,
            sample_every=steps, optim=dataclasses.replace(demo.optim, learning_rate=learning_rates.get(name, 2e-3)),
        )
        for name, model in models.items()
    }  # fmt: skip


def count_parameters(model) -> int:
    """Return the number of parameters of a model."""
    shapes = jax.eval_shape(functools.partial(tokenizers.init, model), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def mean_lpips(weights: dict, a_u8: np.ndarray, b_u8: np.ndarray) -> float:
    """Return the mean LPIPS distance of pairs of uint8 images."""
    x, y = (jnp.asarray(image, jnp.float32) / 127.5 - 1 for image in (a_u8, b_u8))
    return float(jnp.mean(jax.jit(lpips.lpips)(weights, x, y)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizers"))
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="some of dvae, vqgan, restarts, fsq; default: all"
    )
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--count", type=int, default=256, help="held-out images")
    parser.add_argument(
        "--lpips", default=None, help="npz file with the weights of LPIPS (docs/tokenizers.md)"
    )
    parser.add_argument("--fid-weights", default=None, help="npz file with the Inception-v3 of FID")
    args = parser.parse_args()
    network, reference = None, None
    if args.fid_weights is not None:
        network = inception.load_inception(args.fid_weights)
        reference = metrics.reference_stats(network, load_shipped_config("demo_dvae").data, 32, args.count)
    weights = None if args.lpips is None else lpips.load_lpips(args.lpips)
    rows, shown, labels = {}, [], []
    runs = make_configs(args.out, args.steps)
    if unknown := set(args.only or ()) - set(runs):
        parser.error(f"--only {' '.join(sorted(unknown))}; use some of {', '.join(runs)}")
    for name in args.only or runs:
        config = runs[name]
        if not loop.train(config).finished:
            return
        tokenizer = load(config.run, TokenizerPipeline)
        source = open_source(config.data.source, "eval", languages=())
        original = eval_batch(config.data, source, args.count, image_size=32)["image"]
        if not shown:
            shown, labels = [original[:8]], ["original"] * 8
        reconstructed = tokenizer.reconstruct(original)
        shown.append(reconstructed[:8])
        labels += [name] * 8
        result = metrics.measure_tokenizer(tokenizer, config.data, args.count)
        result |= {
            "accuracy": metrics.reconstruction_accuracy(tokenizer, config.data, args.count)[
                "accuracy_reconstruction"
            ]
        }
        result |= {} if weights is None else {"lpips": mean_lpips(weights, original, reconstructed)}
        if network is not None:
            result["rfid"] = metrics.measure_rfid(network, tokenizer, config.data, reference, args.count)[
                "rfid"
            ]
        rows[name] = {"parameters": count_parameters(config.model), **result}
    images.save_png(
        args.out / "tokenizers.png", images.image_grid(np.concatenate(shown), 8, labels=labels, scale=3)
    )
    names = list(next(iter(rows.values())))
    batch = load_shipped_config("demo_dvae").data.batch_size
    print(f"{args.steps} updates of {batch} images; {args.count} held-out images")
    print("  ".join(["        ", *names]))
    for name, row in rows.items():
        print(
            "  ".join(
                [
                    f"{name:<8}",
                    *(f"{row[n]:>{len(n)}.4g}" if n != "parameters" else f"{row[n]:>10,}" for n in names),
                ]
            )
        )


if __name__ == "__main__":
    main()
