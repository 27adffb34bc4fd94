"""The reference implementations with small random weights, saved as they save themselves, and what they answer.

    pip install torch==2.13.0 numpy attrs requests einops && pip install --no-deps DALL-E==0.1
    python tests/golden/reference.py            # writes the directories beside this file again

Each function makes one family: the checkpoint in its own format, and `answers.npz` with inputs and outputs. The tests
check these files; where the packages are installed, `pytest -m parity` makes larger models anew and checks those.
"""

import sys
from pathlib import Path

import numpy as np

SHAPES = ((16, 16), (40, 40), (24, 40))  # of pictures; also odd numbers of codes, and oblong


def _seeded(seed):
    import torch

    torch.manual_seed(seed)
    torch.set_grad_enabled(False)
    return torch


def _random_biases(torch, module):
    """Biases begin at zero there, which would hide one that is not imported."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return module


def openai_dvae(out, *, width=4, blocks=1, vocab=32, decoder_width=8, seed=0, zipped=True):
    """PyPI `DALL-E` 0.1 (openai/DALL-E): encoder.pkl and decoder.pkl, whole modules."""
    import attr
    from dall_e import Decoder, Encoder, map_pixels, unmap_pixels

    torch = _seeded(seed)
    with attr.validators.disabled():  # the package allows no width under 64
        encoder = Encoder(n_hid=width, n_blk_per_group=blocks, vocab_size=vocab)
        decoder = Decoder(n_hid=width, n_blk_per_group=blocks, vocab_size=vocab, n_init=decoder_width)
    out.mkdir(parents=True, exist_ok=True)
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        _random_biases(torch, module)
        torch.save(module, out / f"{name}.pkl", _use_new_zipfile_serialization=zipped)
    answers = {}
    for i, (height, wide) in enumerate(SHAPES):
        images = torch.rand(1, 3, height, wide)
        logits = encoder(map_pixels(images))
        codes = logits.argmax(dim=1)
        one_hot = torch.nn.functional.one_hot(codes, vocab).permute(0, 3, 1, 2).float()
        pixels = unmap_pixels(torch.sigmoid(decoder(one_hot).float()[:, :3]))
        answers |= {
            f"images_{i}": images.permute(0, 2, 3, 1), f"logits_{i}": logits.permute(0, 2, 3, 1),
            f"codes_{i}": codes, f"pixels_{i}": pixels.permute(0, 2, 3, 1),
        }  # fmt: skip
    np.savez_compressed(out / "answers.npz", **{name: x.numpy() for name, x in answers.items()})


GOLDEN = {"openai_dvae": openai_dvae}

if __name__ == "__main__":
    for name in sys.argv[1:] or GOLDEN:
        GOLDEN[name](Path(__file__).parent / name)
