"""Host memory of `dalle-jax import` on a file as large as DALL-E Mega's: 2,587,521,024 float32 parameters, 10.35 GB.

    python -m benchmarks.import_memory --work /some/disk        # wants 21 GB there; --layers 6 wants less

The file has Mega's names, shapes and layout; its numbers are zeros that the file system does not store, but which
are read, checked and written like any. The command runs in a process of its own, whose largest resident size
(ru_maxrss, pages mapped from the file among them) is compared with the size of the file.
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


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of dalle-mini/dalle-mega's flax_model.msgpack, with any number of layers."""
    found: dict[str, tuple[int, ...]] = {"lm_head/kernel": (DIM, IMAGE + 1)}
    for part, vocab, length in (("encoder", TEXT, 64), ("decoder", IMAGE + 1, 256)):
        top = f"model/{part}"
        found[f"{top}/embed_tokens/embedding"] = (vocab, DIM)
        found[f"{top}/embed_positions/embedding"] = (length, DIM)
        found |= {f"{top}/layernorm_embedding/{kind}": (DIM,) for kind in ("bias", "scale")}
        found[f"{top}/final_ln/bias"] = (DIM,)
        layer = f"{top}/layers/FlaxBart{part.title()}Layers"
        for i in range(1 if part == "encoder" else 2):
            for name in ("q", "k", "v", "out"):
                found[f"{layer}/FlaxBartAttention_{i}/{name}_proj/kernel"] = (layers, DIM, DIM)
            found[f"{layer}/LayerNorm_{2 * i}/bias"] = (layers, DIM)
            found |= {f"{layer}/LayerNorm_{2 * i + 1}/{kind}": (layers, DIM) for kind in ("bias", "scale")}
        found[f"{layer}/GLU_0/LayerNorm_0/bias"] = (layers, DIM)
        found[f"{layer}/GLU_0/LayerNorm_1/bias"] = (layers, GLU)
        found |= {f"{layer}/GLU_0/Dense_{i}/kernel": (layers, DIM, GLU) for i in (0, 1)}
        found[f"{layer}/GLU_0/Dense_2/kernel"] = (layers, GLU, DIM)
    return found


def write(path: Path, layers: int) -> int:
    """Flax's msgpack, the arrays' bytes left as holes; returns the number of parameters."""
    tree: dict = {}
    for name, shape in shapes(layers).items():
        node = tree
        *above, last = name.split("/")
        for word in above:
            node = node.setdefault(word, {})
        node[last] = shape
    count = 0

    def text(word: str) -> bytes:
        return struct.pack(">BB", 0xD9, len(word)) + word.encode()

    def put(file, node) -> None:
        nonlocal count
        if isinstance(node, dict):
            file.write(struct.pack(">BH", 0xDE, len(node)))
            for name, value in node.items():
                file.write(text(name))
                put(file, value)
            return
        numbers = 1
        for size in node:
            numbers *= size
        count += numbers
        head = b"\x93" + bytes([0x90 + len(node)]) + b"".join(struct.pack(">BI", 0xCE, size) for size in node)
        head += text("float32") + struct.pack(">BI", 0xC6, 4 * numbers)
        file.write(struct.pack(">BIb", 0xC9, len(head) + 4 * numbers, 1) + head)
        file.seek(4 * numbers, 1)

    with open(path, "wb") as file:
        put(file, tree)
        file.truncate()
    return count


def write_tokenizer(path: Path) -> None:
    """A run of a tiny tokenizer with the codes that Mega reads."""
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
    parser.add_argument("--work", type=Path, required=True, help="a directory that is new or empty")
    parser.add_argument("--layers", type=int, default=24, help="in each of encoder and decoder; Mega has 24")
    args = parser.parse_args()
    source = args.work / "mega"
    source.mkdir(parents=True)
    count = write(source / "flax_model.msgpack", args.layers)
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
    begun = time.perf_counter()
    command = [sys.executable, "-m", "dalle_jax.cli", "import", "dalle-mini", str(source)]
    command += ["--out", str(args.work / "run"), "--image-tokenizer", str(args.work / "tokenizer")]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{count:,} parameters, file {size / 1e9:.2f} GB, {seconds:.0f} s")
    print(f"largest resident size {peak / 1e9:.2f} GB = {peak / size:.2f} x the file")


if __name__ == "__main__":
    main()
