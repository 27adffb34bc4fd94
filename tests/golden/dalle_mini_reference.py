"""Writes a small DALL-E Mini in its own format, with what min-dalle computes with its weights.

    pip install torch min-dalle flax tokenizers
    python tests/golden/dalle_mini_reference.py tests/golden/dalle_mini

min-dalle is in torch, so the arrays get its names. Its norms have scales where the published weights have none: these
are ones. The grid is the published one, 16 x 16, the only one that min-dalle supports.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

CAPTIONS = ["a red circle above", ""]  # min-dalle computes two captions at once, the second the null caption
MORE = ["red red red red red red red red", "a  tall (blue) square"]  # ids only
TEXT_LEN, IMAGE_VOCAB, DIM, LAYERS, HEADS, GLU = 8, 20, 16, 2, 2, 11


def available() -> bool:
    return all(importlib.util.find_spec(name) for name in ("torch", "min_dalle", "flax", "tokenizers"))


def _vocabulary(out: Path) -> np.ndarray:
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [" a red circle above a blue square"] * 9, vocab_size=300, min_frequency=1,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False,
    )  # fmt: skip
    bpe.save_model(str(out))
    bpe = ByteLevelBPETokenizer(str(out / "vocab.json"), str(out / "merges.txt"))
    bpe._tokenizer.post_processor = RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=False, add_prefix_space=False
    )
    bpe.enable_truncation(max_length=TEXT_LEN)
    bpe.enable_padding(length=TEXT_LEN, pad_id=1, pad_token="<pad>")
    return np.array([bpe.encode(caption).ids for caption in [*CAPTIONS, *MORE]])


def _tree(text_vocab: int) -> dict:
    rng = np.random.default_rng(0)

    def array(*shape, middle=0.0):
        return (middle + 0.3 * rng.normal(size=shape)).astype(np.float32)

    def norm(width, *lead, scale=False):
        return {"bias": array(*lead, width)} | ({"scale": array(*lead, width, middle=1.0)} if scale else {})

    def stack(crosses):
        layer = {}
        for i in range(1 + crosses):
            names = ("q_proj", "k_proj", "v_proj", "out_proj")
            layer[f"FlaxBartAttention_{i}"] = {name: {"kernel": array(LAYERS, DIM, DIM)} for name in names}
            layer[f"LayerNorm_{2 * i}"] = norm(DIM, LAYERS)
            layer[f"LayerNorm_{2 * i + 1}"] = norm(DIM, LAYERS, scale=True)
        layer["GLU_0"] = {
            "LayerNorm_0": norm(DIM, LAYERS), "LayerNorm_1": norm(GLU, LAYERS),
            "Dense_0": {"kernel": array(LAYERS, DIM, GLU)}, "Dense_1": {"kernel": array(LAYERS, DIM, GLU)},
            "Dense_2": {"kernel": array(LAYERS, GLU, DIM)},
        }  # fmt: skip
        return layer

    def part(name, vocab, length, crosses):
        return {
            "embed_tokens": {"embedding": array(vocab, DIM)}, "embed_positions": {"embedding": array(length, DIM)},
            "layernorm_embedding": norm(DIM, scale=True), "final_ln": norm(DIM),
            "layers": {f"FlaxBart{name}Layers": stack(crosses)},
        }  # fmt: skip

    encoder = part("Encoder", text_vocab, TEXT_LEN, 0)
    decoder = part("Decoder", IMAGE_VOCAB + 1, 256, 1)
    return {
        "model": {"encoder": encoder, "decoder": decoder},
        "lm_head": {"kernel": array(DIM, IMAGE_VOCAB + 1)},
    }


def _load(tree, name):
    """Return the arrays of one half of the tree under the names of min-dalle."""
    layers = tree["layers"][f"FlaxBart{name}Layers"]
    cross = "FlaxBartAttention_1" in layers
    names = {
        "self_attn": "FlaxBartAttention_0",
        "pre_self_attn_layer_norm": "LayerNorm_0",
        "self_attn_layer_norm": "LayerNorm_1",
    }
    if cross:
        names |= {"encoder_attn": "FlaxBartAttention_1", "pre_encoder_attn_layer_norm": "LayerNorm_2"}
        names |= {"encoder_attn_layer_norm": "LayerNorm_3"}
    state = {}

    def norm(to, values):
        state[f"{to}.bias"] = values["bias"]
        state[f"{to}.weight"] = values.get("scale", np.ones_like(values["bias"]))

    for key in ("embed_tokens", "embed_positions"):
        state[f"{key}.weight"] = tree[key]["embedding"]
    for key in ("layernorm_embedding", "final_ln"):
        norm(key, tree[key])
    for i in range(LAYERS):
        for to, source in names.items():
            values = layers[source]
            if "bias" in values:
                norm(f"layers.{i}.{to}", {k: v[i] for k, v in values.items()})
            else:
                state |= {f"layers.{i}.{to}.{k}.weight": v["kernel"][i].T for k, v in values.items()}
        glu = layers["GLU_0"]
        for j in range(3):
            state[f"layers.{i}.glu.fc{j}.weight"] = glu[f"Dense_{j}"]["kernel"][i].T
        for j in range(2):
            norm(f"layers.{i}.glu.ln{j}", {k: v[i] for k, v in glu[f"LayerNorm_{j}"].items()})
    return state


def write(out: Path) -> None:
    import torch
    from flax.serialization import msgpack_serialize
    from min_dalle.models.dalle_bart_decoder import DalleBartDecoder
    from min_dalle.models.dalle_bart_encoder import DalleBartEncoder

    out.mkdir(parents=True, exist_ok=True)
    ids = _vocabulary(out)
    text_vocab = len(json.loads((out / "vocab.json").read_text()))
    tree = _tree(text_vocab)
    (out / "flax_model.msgpack").write_bytes(msgpack_serialize(tree))
    settings = {
        "encoder_attention_heads": HEADS, "decoder_start_token_id": IMAGE_VOCAB, "image_vocab_size": IMAGE_VOCAB,
        "ln_positions": "normformer", "use_glu": True, "use_scan": True, "pad_token_id": 1, "bos_token_id": 0,
        "eos_token_id": 2, "normalize_text": False,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")

    encoder = DalleBartEncoder(LAYERS, DIM, HEADS, text_vocab, TEXT_LEN, GLU, "cpu").eval()
    decoder = DalleBartDecoder(IMAGE_VOCAB, DIM, HEADS, GLU, LAYERS, "cpu").eval()
    states = [_load(tree["model"]["encoder"], "Encoder"), _load(tree["model"]["decoder"], "Decoder")]
    states[1]["lm_head.weight"] = tree["lm_head"]["kernel"].T
    for module, state in zip((encoder, decoder), states, strict=True):
        module.load_state_dict({name: torch.tensor(np.ascontiguousarray(x)) for name, x in state.items()})
    codes = np.random.default_rng(1).integers(0, IMAGE_VOCAB, (1, 256))
    fed = torch.tensor(np.concatenate([[[IMAGE_VOCAB]], codes[:, :-1]], axis=1))
    text = torch.tensor(ids[:2])
    with torch.no_grad():
        logits, _ = decoder(
            attention_mask=text.not_equal(1)[:, None, None, :], encoder_state=encoder(text),
            attention_state=[None] * LAYERS, prev_tokens=fed, token_index=torch.arange(256),
        )  # fmt: skip
    np.savez_compressed(
        out / "answers.npz",
        captions=np.array([*CAPTIONS, *MORE]),
        text=ids,
        codes=codes,
        logits=logits.numpy(),
    )


if __name__ == "__main__":
    write(Path(sys.argv[1]))
