"""Writes a small LlamaGen model on captions with a small T5, in their own formats, with what the references compute.

    PYTHONPATH=path/to/LlamaGen python tests/golden/llamagen_t2i_reference.py tests/golden/llamagen_t2i

Needs torch, transformers, sentencepiece, protobuf, ftfy, beautifulsoup4 and github.com/FoundationVision/LlamaGen (its
`autoregressive/`, `language/` and `utils/` on the path).
"""

import importlib
import importlib.util
import io
import sys
from pathlib import Path

import numpy as np

IMAGE_VOCAB, SIDE, LENGTH, WIDTH, GUIDANCE = 24, 4, 120, 16, 3.0  # the length 120 is a constant of its code
CAPTIONS = (
    "A Red circle, above a blue square!",
    "the star",
    "a green triangle below a green triangle beside one more green triangle " * 8
    + "and this is too long to be read",
    "see https://www.example.com/a_b <b>Two</b> &amp; “three” blue-ish dots @someone 640x480 photo.jpg — 红色",
    "红色的圆",
)


def available() -> bool:
    names = ("torch", "transformers", "sentencepiece", "ftfy", "bs4", "autoregressive", "language")
    return all(importlib.util.find_spec(name) for name in names)


def write(out: Path) -> None:
    import torch
    import transformers
    from language.t5 import T5Embedder

    gpt = importlib.import_module("autoregressive.models.gpt")
    torch.manual_seed(0)
    folder = out / "flan-t5"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(_vocabulary())
    config = transformers.T5Config(
        vocab_size=96, d_model=WIDTH, d_kv=8, d_ff=20, num_layers=2, num_decoder_layers=1, num_heads=2,
        relative_attention_num_buckets=8, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    whole = transformers.T5ForConditionalGeneration(config)
    _randomize(whole)
    whole.save_pretrained(folder, max_shard_size="12KB")
    embedder = T5Embedder.__new__(T5Embedder)  # its constructor downloads a model
    embedder.device, embedder.use_text_preprocessing = torch.device("cpu"), True
    embedder.model_max_length = LENGTH
    embedder.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    embedder.model = transformers.T5EncoderModel.from_pretrained(folder).eval()
    features, masks = embedder.get_text_embeddings(list(CAPTIONS))
    ids = embedder.tokenizer(
        [embedder.text_preprocessing(caption) for caption in CAPTIONS],
        max_length=LENGTH, padding="max_length", truncation=True,
    )["input_ids"]  # fmt: skip

    # Padding moves to the left, as in `sample_t2i.py`.
    counts = masks.sum(dim=1).tolist()
    features = torch.stack([torch.roll(x, LENGTH - n, dims=0) for x, n in zip(features, counts, strict=True)])
    masks = torch.flip(masks, dims=[-1])
    features = features * masks[..., None]

    args = gpt.ModelArgs(
        dim=16, n_layer=2, n_head=2, multiple_of=8, caption_dim=WIDTH, model_type="t2i", vocab_size=IMAGE_VOCAB,
        block_size=SIDE**2, cls_token_num=LENGTH,
    )  # fmt: skip
    model = gpt.Transformer(args).eval()
    _randomize(model)
    torch.save({"model": model.state_dict()}, out / "t2i_tiny_64.pt")

    codes = torch.randint(IMAGE_VOCAB, (len(CAPTIONS), SIDE**2))
    length = LENGTH + SIDE**2 - 1
    attended = torch.nn.functional.pad(masks, (0, SIDE**2 - 1), value=1).bool()
    mask = torch.tril(torch.ones(length, length, dtype=torch.bool))[None] & attended[:, None]
    mask = (mask | torch.eye(length, dtype=torch.bool))[:, None]
    results = {"captions": np.array(CAPTIONS), "ids": np.array(ids), "codes": codes.numpy()}
    null = model.cls_embedding.uncond_embedding.expand(features.shape)
    with torch.no_grad():
        for name, given in (("logits", features), ("null_logits", null)):
            found = model(codes[:, :-1], given, input_pos=torch.arange(length), mask=mask)[0]
            results[name] = found[:, LENGTH - 1 :].numpy()
        generate = importlib.import_module("autoregressive.models.generate").generate
        results["greedy"] = generate(
            model, features, SIDE**2, masks, cfg_scale=GUIDANCE, temperature=1.0, top_k=0, top_p=1.0,
            sample_logits=False,
        ).numpy()  # fmt: skip
    distances = torch.arange(-300, 301)
    attention = embedder.model.encoder.block[0].layer[0].SelfAttention
    results["buckets"] = attention._relative_position_bucket(
        distances, num_buckets=32, max_distance=128
    ).numpy()
    np.savez_compressed(out / "answers.npz", **results)


def _randomize(model) -> None:
    import torch

    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(float("norm" in name) + 0.3 * torch.randn_like(tensor))


def _vocabulary() -> bytes:
    """Return a unigram model like that of T5: padding, end, unknown, then pieces; without tables of normalization."""
    import sentencepiece

    colors, shapes = ("red", "green", "blue"), ("circle", "square", "triangle", "star")
    lines = [f"a {c} {s} above one {d} {t}" for c in colors for s in shapes for d in colors for t in shapes]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="unigram", vocab_size=64, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, normalization_rule_name="identity", minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return model.getvalue()


def published() -> dict[str, dict[str, list[int]]]:
    """Return names and shapes of the tensors of the full-size models; no array is allocated."""
    import torch
    import transformers

    gpt = importlib.import_module("autoregressive.models.gpt")
    linspace = torch.linspace
    torch.linspace = lambda *args: linspace(*args, device="cpu")  # its values are needed, not only its shape
    config = transformers.T5Config(
        vocab_size=32_128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = gpt.GPT_models["GPT-XL"](
            vocab_size=16_384, block_size=256, cls_token_num=120, model_type="t2i"
        )
        encoder = transformers.T5EncoderModel(config)
    models = {"llamagen-t2i-XL": model, "flan-t5-xl-encoder": encoder}
    return {n: {name: list(x.shape) for name, x in m.state_dict().items()} for n, m in models.items()}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
