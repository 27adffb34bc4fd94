"""Writes a small minDALL-E in its own format, with what the reference implementation computes with it.

    PYTHONPATH=path/to/minDALL-E python tests/golden/mindalle_reference.py tests/golden/mindalle

Needs torch, omegaconf, tokenizers and github.com/kakaobrain/minDALL-E (its `dalle/` folder on the path). The image
tokenizer only has the format; the script computes nothing with it.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np

CAPTIONS = ["a red circle", "a blue square above a red circle", "Two Circles!", "круг", ""]
TEXT_VOCAB, IMAGE_VOCAB, TEXT_LEN, SIDE, DIM, LAYERS, HEADS = 48, 24, 6, 4, 24, 3, 2


def available() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "tokenizers", "omegaconf")) and (
        importlib.util.find_spec("dalle") is not None
    )


def _transformer():
    """Import the module of the Transformer without the __init__ of the package, which needs a trainer."""
    if "dalle.models" not in sys.modules:
        where = Path(importlib.util.find_spec("dalle").submodule_search_locations[0])
        for name in ("dalle", "dalle.models"):
            package = types.ModuleType(name)
            package.__path__ = [str(where.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
    return importlib.import_module("dalle.models.stage2.transformer").Transformer1d


def write(out: Path) -> None:
    import torch
    from omegaconf import OmegaConf
    from tokenizers import CharBPETokenizer

    out.mkdir(parents=True, exist_ok=True)
    folder = out / "tokenizer"
    folder.mkdir(exist_ok=True)
    text = CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    text.train_from_iterator(
        CAPTIONS[:3] * 9, vocab_size=TEXT_VOCAB, min_frequency=1, special_tokens=["[PAD]", "[UNK]"]
    )
    text.save_model(str(folder), "bpe-16k")
    text = CharBPETokenizer.from_file(
        vocab_filename=str(folder / "bpe-16k-vocab.json"), merges_filename=str(folder / "bpe-16k-merges.txt"),
        unk_token="[UNK]", lowercase=True, dropout=None,
    )  # fmt: skip
    text.add_special_tokens(["[PAD]"])
    text.enable_padding(length=TEXT_LEN, pad_id=text.token_to_id("[PAD]"))
    text.enable_truncation(max_length=TEXT_LEN)
    ids = np.array([text.encode(caption).ids for caption in CAPTIONS])

    hparams = {
        "embed_dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "n_dense_layers": LAYERS, "ctx_len_img": SIDE**2,
        "ctx_len_txt": TEXT_LEN, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "mlp_bias": True,
        "attn_bias": True, "gelu_use_approx": False,
    }  # fmt: skip
    stage2 = {"type": "transformer1d", "vocab_size_txt": TEXT_VOCAB, "vocab_size_img": IMAGE_VOCAB}
    OmegaConf.save(OmegaConf.create({"stage2": {**stage2, "hparams": hparams}}), out / "config.yaml")
    torch.manual_seed(0)
    model = _transformer()(TEXT_VOCAB, IMAGE_VOCAB, OmegaConf.create(hparams)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.sign() * (parameter.data.abs() > 0.99) + 0.3 * torch.randn_like(
            parameter
        )
    torch.save({"state_dict": model.state_dict()}, out / "stage2_last.ckpt")
    torch.save({"state_dict": _tokenizer(torch)}, out / "stage1_last.ckpt")

    codes = torch.randint(IMAGE_VOCAB, (len(ids), SIDE**2))
    places = [torch.arange(n).repeat(len(ids), 1) for n in (SIDE**2, TEXT_LEN)]
    with torch.no_grad():
        image, words = model(codes, torch.tensor(ids), *places)
    np.savez_compressed(
        out / "answers.npz", captions=np.array(CAPTIONS), text=ids, codes=codes.numpy(),
        text_logits=words.numpy(), image_logits=image.numpy(),
    )  # fmt: skip


def published() -> dict[str, dict[str, list[int]]]:
    """Return names and shapes of the tensors of the full-size models; no array is allocated."""
    import torch
    from omegaconf import OmegaConf

    hparams = {
        "embed_dim": 1536, "n_layers": 42, "n_heads": 24, "n_dense_layers": 42, "ctx_len_img": 256, "ctx_len_txt": 64,
        "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "mlp_bias": True, "attn_bias": True,
        "gelu_use_approx": False,
    }  # fmt: skip
    with torch.device("meta"):
        model = _transformer()(16_384, 16_384, OmegaConf.create(hparams))
    return {"mindalle": {name: list(tensor.shape) for name, tensor in model.state_dict().items()}}


def _tokenizer(torch):
    """Return random weights under the names of a VQGAN with two resolutions and 4 channels."""
    shapes = {"quantize.embedding.weight": (IMAGE_VOCAB, 4)}

    def conv(name, before, after, side):
        shapes.update({f"{name}.weight": (after, before, side, side), f"{name}.bias": (after,)})

    def norm(name):
        shapes.update({f"{name}.weight": (4,), f"{name}.bias": (4,)})

    def block(name):
        for i in (1, 2):
            norm(f"{name}.norm{i}")
            conv(f"{name}.conv{i}", 4, 4, 3)

    def attention(name):
        norm(f"{name}.norm")
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", 4, 4, 1)

    for part, way, count, ends in (("encoder", "down", 1, (3, 4)), ("decoder", "up", 2, (4, 3))):
        conv(f"{part}.conv_in", ends[0], 4, 3)
        for level in (0, 1):
            for j in range(count):
                block(f"{part}.{way}.{level}.block.{j}")
                if level == 1:
                    attention(f"{part}.{way}.{level}.attn.{j}")
        conv(f"{part}.down.0.downsample.conv" if way == "down" else f"{part}.up.1.upsample.conv", 4, 4, 3)
        block(f"{part}.mid.block_1")
        attention(f"{part}.mid.attn_1")
        block(f"{part}.mid.block_2")
        norm(f"{part}.norm_out")
        conv(f"{part}.conv_out", 4, ends[1], 3)
    conv("quant_conv", 4, 4, 1)
    conv("post_quant_conv", 4, 4, 1)
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
