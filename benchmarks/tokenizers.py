"""dVAE, VQGAN and FSQ side by side: as many parameters, codes, pictures and updates each, on the demo's scenes.

    python -m benchmarks.tokenizers --out runs/tokenizers [--only vqgan restarts] [--steps 1500] [--lpips FILE.npz]
        [--fid-weights FILE.npz]

Trains four tokenizers of 8 x 8 codes out of 128 for pictures of 32 x 32 pixels, goes on where it was stopped, and
prints a table of held-out pictures: PSNR, share of the codebook in use and its perplexity, the share of
reconstructions that the verifier reads right, with --lpips the LPIPS distance, with --fid-weights the FID of
reconstructions (docs/evaluation.md; it compares at the same count only). OUT/tokenizers.png shows the same
pictures from each. All train without a discriminator, so that the codes are what differs; the VQGAN architecture
stands three times, with a learned codebook, with one whose unused codes begin anew (`restarts`), and with finite
scalars (Mentzer et al. 2023, arXiv 2309.15505).
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
from dalle_jax.config.files import load_config
from dalle_jax.data import images
from dalle_jax.data.loader.pipeline import eval_batch
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import inception, metrics
from dalle_jax.models import lpips
from dalle_jax.models import tokenizer as tokenizers
from dalle_jax.pipelines import ImageTokenizer, decode_codes, encode_images, load_image_tokenizer
from dalle_jax.train import loop


def configs(out: Path, steps: int) -> dict[str, TrainConfig]:
    """The four runs; parameters within 1% of each other."""
    demo = load_config("demo_dvae")
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
    rates = {"dvae": demo.optim.learning_rate}
    often = max(1, steps // 4)
    return {
        name: dataclasses.replace(
            demo, run=str(out / name), model=model, steps=steps, eval_every=often, save_every=often,
            sample_every=steps, optim=dataclasses.replace(demo.optim, learning_rate=rates.get(name, 2e-3)),
        )
        for name, model in models.items()
    }  # fmt: skip


def parameters(model) -> int:
    """How many, by shape alone."""
    shapes = jax.eval_shape(functools.partial(tokenizers.init, model), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def again(tokenizer: ImageTokenizer, pictures: np.ndarray) -> np.ndarray:
    """Pictures from their codes, uint8."""
    return images.to_uint8(decode_codes(tokenizer, encode_images(tokenizer, pictures)))


def lpips_of(weights: dict, true: np.ndarray, made: np.ndarray) -> float:
    """Mean LPIPS distance of uint8 pictures."""
    x, y = (jnp.asarray(p, jnp.float32) / 127.5 - 1 for p in (true, made))
    return float(jnp.mean(jax.jit(lpips.lpips)(weights, x, y)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizers"))
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="of dvae, vqgan, restarts, fsq; all without it"
    )
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--count", type=int, default=256, help="held-out pictures that are measured")
    parser.add_argument("--lpips", default=None, help="npz with the weights of LPIPS (docs/tokenizers.md)")
    parser.add_argument("--fid-weights", default=None, help="npz with the Inception-v3 of FID")
    args = parser.parse_args()
    network, truth = None, None
    if args.fid_weights is not None:
        network = inception.load_inception(args.fid_weights)
        truth = metrics.reference_stats(network, load_config("demo_dvae").data, 32, args.count)
    weights = None if args.lpips is None else lpips.load_lpips(args.lpips)
    rows, shown, labels = {}, [], []
    runs = configs(args.out, args.steps)
    if unknown := set(args.only or ()) - set(runs):
        parser.error(f"--only {' '.join(sorted(unknown))}; want some of {', '.join(runs)}")
    for name in args.only or runs:
        config = runs[name]
        if not loop.train(config).finished:
            return
        tokenizer = load_image_tokenizer(config.run)
        source = open_source(config.data.source, "eval", languages=())
        true = eval_batch(config.data, source, args.count, image_size=32)["image"]
        if not shown:
            shown, labels = [true[:8]], ["picture"] * 8
        made = again(tokenizer, true)
        shown.append(made[:8])
        labels += [name] * 8
        found = metrics.measure_tokenizer(tokenizer, config.data, args.count)
        found |= {
            "right": metrics.reconstruction_accuracy(tokenizer, config.data, args.count)[
                "accuracy_reconstruction"
            ]
        }
        found |= {} if weights is None else {"lpips": lpips_of(weights, true, made)}
        if network is not None:
            found["rfid"] = metrics.measure_rfid(network, tokenizer, config.data, truth, args.count)["rfid"]
        rows[name] = {"parameters": parameters(config.model), **found}
    images.save_png(
        args.out / "tokenizers.png", images.image_grid(np.concatenate(shown), 8, labels=labels, scale=3)
    )
    names = list(next(iter(rows.values())))
    batch = load_config("demo_dvae").data.batch_size
    print(f"{args.steps} updates of {batch} pictures; {args.count} held-out pictures")
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
