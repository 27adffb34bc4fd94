"""Writes small Malevich models in their own format, with what the reference implementation computes with them.

    pip install torch rudalle youtokentome einops
    python tests/golden/rudalle_reference.py tests/golden/rudalle

Of the package `rudalle` only the Transformer is imported, which needs nothing but torch and einops.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np

CAPTIONS = ["красный круг", "Синий квадрат над красным кругом  и ещё", "日本 круг", "a red\tcircle"]
VOCAB, IMAGE_VOCAB, TEXT_LEN, SIDE, DIM, LAYERS, HEADS = 44, 12, 9, 12, 16, 4, 2


def available() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "rudalle", "einops", "youtokentome"))


def _model():
    if "rudalle.dalle" not in sys.modules:  # its __init__ needs a trainer and a hub
        where = Path(importlib.util.find_spec("rudalle").submodule_search_locations[0])
        for name in ("rudalle", "rudalle.dalle"):
            package = types.ModuleType(name)
            package.__path__ = [str(where.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
    return importlib.import_module("rudalle.dalle.model").DalleModel


def _captions(out: Path) -> np.ndarray:
    """Return ids like those of the tokenizer of the package: begin, pieces, end, truncated, padded with zeros."""
    import youtokentome

    lines = out / "lines.txt"
    lines.write_text("\n".join(c.lower().strip() for c in CAPTIONS[:2] * 5), encoding="utf-8")
    bpe = youtokentome.BPE.train(str(lines), str(out / "bpe.model"), vocab_size=VOCAB)
    lines.unlink()
    rows = np.zeros((len(CAPTIONS), TEXT_LEN), int)
    for row, caption in zip(rows, CAPTIONS, strict=True):
        ids = [2, *bpe.encode([caption.lower().strip()], output_type=youtokentome.OutputType.ID)[0], 3]
        row[: len(ids)] = ids[:TEXT_LEN]
    return rows


def write(out: Path) -> None:
    import torch

    out.mkdir(parents=True, exist_ok=True)
    text = torch.tensor(_captions(out))
    torch.manual_seed(0)
    codes = torch.randint(IMAGE_VOCAB, (len(text), SIDE**2))
    results = {}
    for version in ("v2", "v3"):
        model = _model()(
            device="cpu", num_layers=LAYERS, vocab_size=VOCAB + TEXT_LEN, hidden_size=DIM, num_attention_heads=HEADS,
            embedding_dropout_prob=0.1, attention_dropout_prob=0.1, output_dropout_prob=0.1, text_seq_length=TEXT_LEN,
            image_tokens_per_dim=SIDE, image_vocab_size=IMAGE_VOCAB, cogview_sandwich_layernorm=True,
            cogview_pb_relax=True, hf_version=version,
        ).eval()  # fmt: skip
        for name, parameter in model.named_parameters():
            gain = float("norm" in name or name == "to_logits.0.weight") * float(name.endswith("weight"))
            parameter.data = gain + 0.3 * torch.randn_like(parameter)
        torch.save(model.state_dict(), out / f"pytorch_model_{version}.bin")
        length = TEXT_LEN + SIDE**2
        mask = torch.tril(torch.ones(1, 1, length, length))
        with torch.no_grad():
            results[version] = model(torch.cat([text, codes], dim=1)[:1], mask)[
                0
            ].numpy()  # to limit the size of the file
    np.savez_compressed(
        out / "answers.npz", captions=np.array(CAPTIONS), text=text.numpy(), codes=codes.numpy(), **results
    )


def published() -> dict[str, dict[str, list[int]]]:
    """Return names and shapes of the tensors of the full-size models; no array is allocated."""
    import torch

    with torch.device("meta"):
        model = _model()(
            device="meta", num_layers=24, vocab_size=16_384 + 128, hidden_size=2048, num_attention_heads=16,
            embedding_dropout_prob=0.1, attention_dropout_prob=0.1, output_dropout_prob=0.1, text_seq_length=128,
            image_tokens_per_dim=32, image_vocab_size=8192, cogview_sandwich_layernorm=True, cogview_pb_relax=True,
        )  # fmt: skip
    return {"malevich": {name: list(parameter.shape) for name, parameter in model.named_parameters()}}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
