"""Host memory of `dalle-jax import` for a file of the size of DALL-E Mega: 2,587,521,024 float32 parameters, 10.35 GB.

    python -m benchmarks.import_memory --work /some/disk        # needs 21 GB there; --layers 6 needs less

The file has the names, shapes and layout of DALL-E Mega. Its numbers are zeros in a sparse file, which are read,
checked and written like any others. The command runs in a process of its own, whose maximum resident set size
(ru_maxrss, with the pages mapped from the file) is compared with the size of the file.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax

from dalle_jax.checkpoint.layout import PARAMS_FILE
from dalle_jax.checkpoint.params_file import write_params
from dalle_jax.config import TrainConfig, VectorQuantizer, VQGANConfig, to_json
from dalle_jax.models import tokenizer
from dalle_jax.text import byte_bpe

DIM, HEADS, GLU, TEXT, IMAGE = 2048, 32, 4096, 50_272, 16_415


def param_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of flax_model.msgpack of dalle-mini/dalle-mega, with any number of layers."""
    shapes: dict[str, tuple[int, ...]] = {"lm_head/kernel": (DIM, IMAGE + 1)}
    for part, vocab, length in (("encoder", TEXT, 64), ("decoder", IMAGE + 1, 256)):
        top = f"model/{part}"
        shapes[f"{top}/embed_tokens/embedding"] = (vocab, DIM)
        shapes[f"{top}/embed_positions/embedding"] = (length, DIM)
        shapes |= {f"{top}/layernorm_embedding/{kind}": (DIM,) for kind in ("bias", "scale")}
        shapes[f"{top}/final_ln/bias"] = (DIM,)
        layer = f"{top}/layers/FlaxBart{part.title()}Layers"
        for i in range(1 if part == "encoder" else 2):
            for name in ("q", "k", "v", "out"):
                shapes[f"{layer}/FlaxBartAttention_{i}/{name}_proj/kernel"] = (layers, DIM, DIM)
            shapes[f"{layer}/LayerNorm_{2 * i}/bias"] = (layers, DIM)
            shapes |= {f"{layer}/LayerNorm_{2 * i + 1}/{kind}": (layers, DIM) for kind in ("bias", "scale")}
        shapes[f"{layer}/GLU_0/LayerNorm_0/bias"] = (layers, DIM)
        shapes[f"{layer}/GLU_0/LayerNorm_1/bias"] = (layers, GLU)
        shapes |= {f"{layer}/GLU_0/Dense_{i}/kernel": (layers, DIM, GLU) for i in (0, 1)}
        shapes[f"{layer}/GLU_0/Dense_2/kernel"] = (layers, GLU, DIM)
    return shapes


def write_msgpack(path: Path, layers: int) -> int:
    """Write Flax msgpack with the bytes of the arrays as holes, and return the number of parameters."""
    tree: dict = {}
    for name, shape in param_shapes(layers).items():
        node = tree
        *parents, last = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = shape
    count = 0

    def pack_string(word: str) -> bytes:
        return struct.pack(">BB", 0xD9, len(word)) + word.encode()

    def write_node(file, node) -> None:
        nonlocal count
        if isinstance(node, dict):
            file.write(struct.pack(">BH", 0xDE, len(node)))
            for name, value in node.items():
                file.write(pack_string(name))
                write_node(file, value)
            return
        numbers = 1
        for size in node:
            numbers *= size
        count += numbers
        head = b"\x93" + bytes([0x90 + len(node)]) + b"".join(struct.pack(">BI", 0xCE, size) for size in node)
        head += pack_string("float32") + struct.pack(">BI", 0xC6, 4 * numbers)
        file.write(struct.pack(">BIb", 0xC9, len(head) + 4 * numbers, 1) + head)
        file.seek(4 * numbers, 1)

    with open(path, "wb") as file:
        write_node(file, tree)
        file.truncate()
    return count


def write_tokenizer(path: Path) -> None:
    """Write a run of a tiny image tokenizer with the codebook size of DALL-E Mega."""
    model = VQGANConfig(
        width=4, channel_multipliers=(1,) * 5, blocks=1, attention_levels=(), latent_width=4, adversarial=None,
        quantizer=VectorQuantizer(vocab=16_384, dim=4),
    )  # fmt: skip
    path.mkdir()
    write_params(path / PARAMS_FILE, tokenizer.init(model, jax.random.key(0)), 0)
    (path / "config.json").write_text(to_json(TrainConfig(model=model)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="new or empty directory")
    parser.add_argument(
        "--layers", type=int, default=24, help="of encoder and decoder each; DALL-E Mega has 24"
    )
    args = parser.parse_args()
    source = args.work / "mega"
    source.mkdir(parents=True)
    count = write_msgpack(source / "flax_model.msgpack", args.layers)
    settings = {
        "encoder_attention_heads": HEADS, "image_vocab_size": IMAGE, "decoder_start_token_id": 16_384,
        "normalize_text": True,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(settings))
    letters = byte_bpe._letters()
    vocab = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", *letters])}
    (source / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (source / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write_tokenizer(args.work / "tokenizer")
    size = (source / "flax_model.msgpack").stat().st_size
    begin = time.perf_counter()
    command = [sys.executable, "-m", "dalle_jax.cli", "import", "dalle-mini", str(source)]
    command += ["--out", str(args.work / "run"), "--image-tokenizer", str(args.work / "tokenizer")]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{count:,} parameters, file {size / 1e9:.2f} GB, {seconds:.0f} s")
    print(f"maximum resident set size {peak / 1e9:.2f} GB = {peak / size:.2f} x the file")


if __name__ == "__main__":
    main()
