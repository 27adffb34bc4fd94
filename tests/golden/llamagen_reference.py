"""Writes small class-conditional LlamaGen models in their own format, with what the reference computes with them.

    PYTHONPATH=path/to/LlamaGen python tests/golden/llamagen_reference.py tests/golden/llamagen

Needs torch and github.com/FoundationVision/LlamaGen (its `autoregressive/` and `utils/` on the path).
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np

CLASSES, IMAGE_VOCAB, SIDE = 10, 24, 4
SIZES = {
    "c2i_tiny_64.pt": (16, 2),
    "c2i_odd_64.pt": (40, 2),
}  # width, heads; of 8 and of 20 channels, as in 3B of 100


def available() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "autoregressive"))


def write(out: Path) -> None:
    import torch

    gpt = importlib.import_module("autoregressive.models.gpt")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    labels = torch.tensor([3, 0, CLASSES])  # the last is the null class
    codes = torch.randint(IMAGE_VOCAB, (len(labels), SIDE**2))
    results = {"labels": labels.numpy(), "codes": codes.numpy()}
    for i, (name, (dim, heads)) in enumerate(SIZES.items()):
        args = gpt.ModelArgs(
            dim=dim, n_layer=2, n_head=heads, multiple_of=8, num_classes=CLASSES, vocab_size=IMAGE_VOCAB,
            block_size=SIDE**2, cls_token_num=1,
        )  # fmt: skip
        model = gpt.Transformer(args).eval()
        for key, parameter in model.named_parameters():
            parameter.data = float("norm" in key) + 0.3 * torch.randn_like(parameter)
        torch.save({"module": model.state_dict()} if i else {"model": model.state_dict()}, out / name)
        with (
            torch.no_grad()
        ):  # `input_pos` selects the rotations; outside of training the mask must be passed
            places = torch.arange(SIDE**2)
            mask = torch.tril(torch.ones(SIDE**2, SIDE**2, dtype=torch.bool))[None, None]
            results[name] = model(codes[:, :-1], labels, input_pos=places, mask=mask)[0].numpy()
    np.savez_compressed(out / "answers.npz", **results)


def published() -> dict[str, dict[str, list[int]]]:
    """Return names and shapes of the tensors of the full-size models; no array is allocated."""
    import torch

    gpt = importlib.import_module("autoregressive.models.gpt")
    linspace, found = torch.linspace, {}
    torch.linspace = lambda *args: linspace(*args, device="cpu")  # its values are needed, not only its shape
    for name in ("B", "L", "XL", "XXL", "3B"):
        with torch.device("meta"):
            model = gpt.GPT_models[f"GPT-{name}"](
                vocab_size=16_384, block_size=256, num_classes=1000, cls_token_num=1
            )
        found[f"llamagen-{name}"] = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return found


if __name__ == "__main__":
    write(Path(sys.argv[1]))
