"""Imported Transformers against their reference implementations: equal text ids and logits.

Default: small golden files that the reference implementations wrote and answered (golden/*_reference.py have the
commands). With `-m parity`, where the packages are installed: newly made.
"""

import dataclasses
import functools
import gzip
import importlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_checkpoints import shapes_by_name
from safetensors.numpy import save_file

from dalle_jax import cli
from dalle_jax.checkpoint.layout import PARAMS_FILE
from dalle_jax.checkpoint.load import load_run
from dalle_jax.checkpoint.params_file import write_params
from dalle_jax.config import T5Config, TrainConfig, VectorQuantizer, VQGANConfig, to_json
from dalle_jax.importers import llamagen, mindalle, rudalle
from dalle_jax.importers import t5 as encoders
from dalle_jax.importers.tensors import Tensor
from dalle_jax.models import autoregressive, dalle, tokenizer
from dalle_jax.nn import t5
from dalle_jax.pipelines import TokenizerPipeline, load
from dalle_jax.sampling.generate import generate, row_keys
from dalle_jax.text.tokenizers import TextTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"


def relative(got, want):
    """Return the largest difference divided by the largest expected value."""
    assert got.shape == want.shape
    return float(np.max(np.abs(np.asarray(got) - want)) / np.max(np.abs(want)))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Function from number of codes and side of the grid to a run of an image tokenizer with random weights."""
    made = {}

    def run(vocab, grid):
        if (vocab, grid) not in made:
            levels = 2 if grid > 15 else 3  # scenes have at least 32 pixels
            config = VQGANConfig(
                image_size=grid * 2 ** (levels - 1), width=4, channel_multipliers=(1,) * levels, blocks=1,
                attention_levels=(), latent_width=4, quantizer=VectorQuantizer(vocab=vocab, dim=2), adversarial=None,
            )  # fmt: skip
            out = tmp_path_factory.mktemp(f"tokenizer_{vocab}_{grid}")
            (out / "config.json").write_text(to_json(TrainConfig(model=config)))
            write_params(out / PARAMS_FILE, tokenizer.init(config, jax.random.key(0)), 0)
            made[vocab, grid] = str(out)
        return made[vocab, grid]

    return run


def imported(out, family, path, **flags):
    """Import a model by the command; return its run, its vocabulary, and its configuration with float32."""
    words = [w for name, value in flags.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["import", family, str(path), "--out", str(out), *words]) == 0
    run = load_run(out)
    return (
        run,
        TextTokenizer.load(out / "text_tokenizer.model"),
        dataclasses.replace(run.config.model, dtype="float32"),
    )


@functools.partial(jax.jit, static_argnums=0)
def scores(cfg, params, text_BT, codes_BN):
    return autoregressive.logits(
        cfg, params, jnp.asarray(text_BT, jnp.int32), jnp.asarray(codes_BN, jnp.int32)
    )


def ids_of(text, cfg, captions):
    one = functools.partial(text.encode, text_vocab=cfg.text_vocab, text_len=cfg.text_len)
    return np.stack([one(str(caption)) for caption in captions])


def check_rudalle(files, out, tokenizers):
    with np.load(files / "answers.npz") as file:
        want = dict(file)
    vocab = 44  # pieces; zeros in the file are pads, whose ids follow
    for version in ("v2", "v3"):
        run, text, cfg = imported(
            out / version, "rudalle", files / f"pytorch_model_{version}.bin", text_tokenizer=files / "bpe.model",
            heads=2,
            image_tokenizer=tokenizers(12, 12),
        )  # fmt: skip
        ids = ids_of(text, cfg, want["captions"])
        own = ids[:, 1:] if version == "v2" else ids  # v2 has one more begin token
        position = np.arange(own.shape[1])[None]
        np.testing.assert_array_equal(
            own, np.where(want["text"] == 0, vocab + position + cfg.shift_masks, want["text"])
        )
        words, codes = scores(cfg, run.params, ids[:1], want["codes"][:1])
        if version == "v2":
            assert (
                np.all(ids[:, 0] == 2) and words[..., vocab].max() < -9e3
            )  # the first position is never a pad
            words = np.delete(words, vocab, axis=-1)
        answer, first = want[version], cfg.text_len - 1
        assert relative(words, answer[:, :first, : words.shape[-1]]) < 1e-5
        assert relative(codes, answer[:, first:, words.shape[-1] :][:, : cfg.num_codes]) < 1e-5


def check_llamagen(files, out, tokenizers):
    with np.load(files / "answers.npz") as file:
        want = dict(file)
    for name in ("c2i_tiny_64.pt", "c2i_odd_64.pt"):
        flags = {"heads": 2, "image_size": 64, "image_tokenizer": tokenizers(24, 4)}
        run, text, cfg = imported(out / name, "llamagen", files / name, **flags)
        ids = ids_of(text, cfg, ["" if label == 10 else label for label in want["labels"]])
        np.testing.assert_array_equal(ids[:, 0], want["labels"])
        words, codes = scores(cfg, run.params, ids, want["codes"])
        assert words is None
        assert relative(codes, want[name]) < 1e-5


def check_llamagen_t2i(files, out, tokenizers):
    with np.load(files / "answers.npz") as file:
        want = dict(file)
    flags = {"heads": 2, "image_size": 64, "t5": files / "flan-t5", "image_tokenizer": tokenizers(24, 4)}
    run, text, cfg = imported(out / "run", "llamagen", files / "t2i_tiny_64.pt", **flags)
    ids = ids_of(text, cfg, want["captions"])
    padded = ids >= cfg.text_vocab
    assert padded.any(axis=1).tolist() == [True, True, False, True, True]  # the third was truncated
    ends = np.where(~padded[:, -1:] & (np.arange(cfg.text_len) == cfg.text_len - 1), 1, ids)
    np.testing.assert_array_equal(np.where(padded, 0, ends), want["ids"])
    words, codes = scores(cfg, run.params, ids, want["codes"])
    assert words is None and relative(codes, want["logits"]) < 1e-5
    assert relative(codes, want["null_logits"]) > 0.1
    nulls = np.asarray(dalle.null_texts(cfg, jnp.asarray(ids)))
    assert relative(scores(cfg, run.params, nulls, want["codes"])[1], want["null_logits"]) < 1e-5
    sampled = generate(
        cfg, run.params, jnp.asarray(ids), row_keys(range(len(ids))), temperature=0.0, guidance_scale=3.0
    )
    np.testing.assert_array_equal(sampled, want["greedy"])
    assert len(np.unique(want["greedy"], axis=0)) == len(ids)
    np.testing.assert_array_equal(t5.relative_position_buckets(301, 32)[0], want["buckets"][300:])
    np.testing.assert_array_equal(t5.relative_position_buckets(301, 32)[300], want["buckets"][:301])


def check_dalle_mini(files, out, tokenizers):
    with np.load(files / "answers.npz") as file:
        want = dict(file)
    run, text, cfg = imported(out / "run", "dalle-mini", files, image_tokenizer=tokenizers(20, 16))
    ids = ids_of(text, cfg, want["captions"])
    ids = np.where(ids < cfg.text_vocab, ids, cfg.pad_id)
    cut = ids[:, -1] != cfg.pad_id
    assert cut.any() and not cut.all()
    ids[cut, -1] = cfg.eos_id  # as the model gets a truncated caption
    np.testing.assert_array_equal(ids, want["text"])
    codes = scores(cfg, run.params, ids[:2], np.repeat(want["codes"], 2, axis=0))[1]
    assert relative(codes, want["logits"][..., : cfg.image_vocab]) < 1e-5
    null = autoregressive.null_text(cfg)
    np.testing.assert_array_equal(np.where(null < cfg.text_vocab, null, cfg.pad_id), want["text"][1])


def check_mindalle(files, out, tokenizers):
    with np.load(files / "answers.npz") as file:
        want = dict(file)
    run, text, cfg = imported(out / "run", "mindalle", files)
    ids = ids_of(text, cfg, want["captions"])
    np.testing.assert_array_equal(np.where(ids < cfg.text_vocab, ids, cfg.pad_id), want["text"])
    words, codes = scores(cfg, run.params, ids, want["codes"])
    assert relative(words, want["text_logits"]) < 1e-5 and relative(codes, want["image_logits"]) < 1e-5
    stored = load(run.path, TokenizerPipeline).config  # of 2 resolutions with attention in the second
    assert (stored.vocab, stored.grid, stored.channel_multipliers, stored.attention_levels) == (
        cfg.image_vocab,
        cfg.grid,
        (1, 1),
        (1,),
    )


CHECKS = {
    "mindalle": check_mindalle,
    "rudalle": check_rudalle,
    "llamagen": check_llamagen,
    "llamagen_t2i": check_llamagen_t2i,
    "dalle_mini": check_dalle_mini,
}


@pytest.mark.parametrize("name", CHECKS)
def test_golden(tmp_path, tokenizers, name):
    CHECKS[name](GOLDEN / name, tmp_path, tokenizers)


@pytest.mark.parity
@pytest.mark.parametrize("name", CHECKS)
def test_reference(tmp_path, tokenizers, name):
    reference = importlib.import_module(f"golden.{name}_reference")
    if not reference.available():
        pytest.skip(f"the reference is not installed: {reference.__doc__.splitlines()[2].strip()}")
    reference.write(tmp_path / "files")
    CHECKS[name](tmp_path / "files", tmp_path, tokenizers)


PUBLISHED = {  # model of golden/published_transformers.json.gz: (its importer, parameters, parameters left out)
    "mindalle": (lambda tensors: mindalle.from_tensors("x", tensors, "", 0), 1_291_081_728, 0),
    "malevich": (lambda tensors: rudalle.from_tensors("x", tensors, "v3"), 1_310_410_880, 2048),  # a position of text
    **{
        f"llamagen-{name}": (lambda tensors: llamagen.from_tensors("x", tensors, 16), count, 0)
        for name, count in (
            ("B", 110_888_448), ("L", 342_910_976), ("XL", 774_699_520), ("XXL", 1_410_972_672), ("3B", 3_096_659_200)
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_detected_from_their_tensors(name):
    """Names and shapes of the full-size models of the reference become all parameters; no array is allocated."""
    importer, count, left = PUBLISHED[name]
    shapes = json.loads(gzip.decompress((GOLDEN / "published_transformers.json.gz").read_bytes()))[name]
    zero = np.float32(0)
    tensors = {k: Tensor(tuple(shape), zero.dtype, None) for k, shape in shapes.items()}
    model = importer(tensors)
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors.values()) == count
    ours = shapes_by_name(model.config)
    assert sum(leaf.size for leaf in ours.values()) == count - left
    assert model.config.head_dim == {"malevich": 128, "llamagen-3B": 100}.get(name, 64)
    for parameter, rule in model.rules.items():
        part = rule.parts[0]
        made = part.transform(*(np.broadcast_to(zero, tensors[n].shape) for n in part.names)).shape
        assert ((len(rule.parts), *made) if rule.stacked else made) == ours[parameter].shape, parameter
    assert ours.keys() == model.rules.keys()


def test_the_published_t2i_model_is_detected_from_its_tensors():
    """As above, from the files of LlamaGen and of flan-t5-xl, whose embedding has two names."""
    known = json.loads(gzip.decompress((GOLDEN / "published_transformers.json.gz").read_bytes()))
    gpt, encoder = (
        {name: Tensor(tuple(shape), np.dtype(np.float32), None) for name, shape in known[model].items()}
        for model in ("llamagen-t2i-XL", "flan-t5-xl-encoder")
    )
    del encoder["encoder.embed_tokens.weight"]  # the same as shared.weight
    model = llamagen.from_t2i_tensors("x", gpt, "y", encoder, 32)
    config = model.config
    assert (config.text_encoder, config.text_vocab, config.text_len) == (T5Config(), 32_128, 120)
    assert (config.head_dim, config.layers, config.num_codes) == (64, 36, 1024)
    counts = [sum(int(np.prod(tensor.shape)) for tensor in tensors.values()) for tensors in (gpt, encoder)]
    assert counts == [777_923_840, 1_223_527_424]
    ours = shapes_by_name(config)
    assert sum(leaf.size for leaf in ours.values()) == sum(counts)
    for parameter, rule in model.rules.items():
        part = rule.parts[0]
        made = part.transform(
            *(np.broadcast_to(np.float32(0), model.tensors[n].shape) for n in part.names)
        ).shape
        assert ((len(rule.parts), *made) if rule.stacked else made) == ours[parameter].shape, parameter
    assert ours.keys() == model.rules.keys()


@pytest.fixture(scope="module")
def t2i_run(tmp_path_factory, tokenizers):
    files, out = GOLDEN / "llamagen_t2i", tmp_path_factory.mktemp("captioned") / "run"
    words = ["llamagen", files / "t2i_tiny_64.pt", "--t5", files / "flan-t5", "--out", out, "--heads", 2]
    words += ["--image-size", 64, "--image-tokenizer", tokenizers(24, 4)]
    assert cli.main(["import", *map(str, words)]) == 0
    return out


def test_an_imported_t2i_run_samples_captions(tmp_path, t2i_run):
    """With guidance; codes are equal with continuous batching, which a captions file uses, and without."""
    lines = tmp_path / "captions.txt"
    lines.write_text("a red circle above a blue square\nthe star\n")
    words = ["--num-images", "1", "--guidance-scale", "3", "--batch-size", "2"]
    for name, captions in (
        ("queue", ["--captions-file", str(lines)]),
        ("batch", lines.read_text().splitlines()),
    ):
        assert cli.main(["sample", str(t2i_run), *captions, "--out", str(tmp_path / name), *words]) == 0
    sampled = [np.load(tmp_path / name / "codes.npz")["codes"] for name in ("queue", "batch")]
    assert sampled[1].shape == (2, 16) and (sampled[1][0] != sampled[1][1]).any()
    np.testing.assert_array_equal(*sampled)


def test_an_imported_t2i_run_is_described_and_exported(tmp_path, t2i_run, capsys):
    """`info` counts the text encoder; `export` includes it, its vocabulary and the image tokenizer."""
    assert cli.main(["info", str(t2i_run), "--json"]) == 0
    info, run = json.loads(capsys.readouterr().out), load_run(t2i_run)
    assert info["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(run.params))
    assert info["parts"]["t5"] == sum(leaf.size for leaf in jax.tree.leaves(run.params["t5"]))
    assert cli.main(["export", str(t2i_run), "--out", str(tmp_path / "again")]) == 0
    again = load_run(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, run.params)
    for name in ("text_tokenizer.model", "image_tokenizer/config.json", f"image_tokenizer/{PARAMS_FILE}"):
        assert (tmp_path / "again" / name).read_bytes() == (t2i_run / name).read_bytes()


def test_the_commands_accept_an_imported_run(tmp_path, tokenizers, capsys):
    """`sample` with guidance, its vocabulary and its tokenizer; `info` and `export`."""
    files = GOLDEN / "llamagen" / "c2i_tiny_64.pt"
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["goldfish", *(f"thing {i}" for i in range(9))]))
    flags = {"heads": 2, "image_size": 64, "image_tokenizer": tokenizers(24, 4), "text_tokenizer": names}
    run, _, _ = imported(tmp_path / "run", "llamagen", files, **flags)
    assert {p.name for p in run.path.iterdir()} == {
        "config.json",
        PARAMS_FILE,
        "text_tokenizer.model",
        "image_tokenizer",
    }
    out = tmp_path / "images"
    words = [
        "sample",
        str(run.path),
        "Goldfish",
        "3",
        "--num-images",
        "2",
        "--guidance-scale",
        "2",
        "--top-k",
        "5",
        "--out",
        str(out),
    ]
    assert cli.main([*words, "--batch-size", "4"]) == 0
    codes = np.load(out / "codes.npz")["codes"]
    assert codes.shape == (4, 16) and len(np.unique(codes, axis=0)) == 4
    assert cli.main(["sample", str(run.path), "cat", "--out", str(tmp_path / "none")]) == 1
    assert "Expected a class, got 'cat'. Use its number in [0, 10)" in capsys.readouterr().err
    assert cli.main(["info", str(run.path)]) == 0
    assert cli.main(["export", str(run.path), "--out", str(tmp_path / "again")]) == 0
    again = load_run(tmp_path / "again").params
    jax.tree.map(np.testing.assert_array_equal, again, run.params)


def test_greedy_codes_of_an_encoder_decoder_have_the_highest_logits(tmp_path, tokenizers):
    """Codes of `generate`, which uses caches, against the logits of the full forward pass."""
    run, text, cfg = imported(
        tmp_path / "run", "dalle-mini", GOLDEN / "dalle_mini", image_tokenizer=tokenizers(20, 16)
    )
    ids = ids_of(text, cfg, ["a red circle above", "a blue square"])
    codes = np.asarray(generate(cfg, run.params, jnp.asarray(ids), row_keys([0, 1]), temperature=0.0))
    logits = np.asarray(scores(cfg, run.params, ids, codes)[1])
    sampled_logits = np.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(sampled_logits, logits.max(axis=-1), rtol=1e-4, atol=1e-4)
    assert len(np.unique(codes)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dalle-mini", "rudalle", "llamagen"])
def test_training_initializes_from_an_imported_run(tmp_path, tokenizers, name):
    """One step with a negligible learning rate, from a configuration of another Transformer: model, vocabulary and
    tokenizer are those of the imported run."""
    if name == "dalle-mini":
        path, flags = GOLDEN / "dalle_mini", {"image_tokenizer": tokenizers(20, 16)}
    elif name == "llamagen":
        path = GOLDEN / "llamagen_t2i" / "t2i_tiny_64.pt"
        flags = {
            "t5": path.parent / "flan-t5",
            "image_tokenizer": tokenizers(24, 16),
            "heads": 2,
            "image_size": 256,
        }
    else:
        path = GOLDEN / "rudalle" / "pytorch_model_v2.bin"
        flags = {
            "image_tokenizer": tokenizers(12, 12),
            "heads": 2,
            "text_tokenizer": GOLDEN / "rudalle" / "bpe.model",
        }
    base, _, _ = imported(tmp_path / "base", name, path, **flags)
    config = tmp_path / "config.py"
    config.write_text(
        "from dalle_jax.config import *\n"
        "config = TrainConfig(model=DalleConfig(), data=DataConfig(source=ScenesSource(), batch_size=8), "
        "optim=OptimConfig(learning_rate=1e-9, warmup_steps=0), steps=1, eval_rows=8)\n"
    )
    words = [str(config), "--init-from", str(base.path), "--run", str(tmp_path / "run")]
    assert cli.main(["train", *words]) == 0
    run = load_run(tmp_path / "run", ema=False)
    assert run.config.model == base.config.model and run.step == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), run.params, base.params)
    for part in {"t5"} & base.params.keys():  # frozen
        jax.tree.map(np.testing.assert_array_equal, run.params[part], base.params[part])
    assert (run.path / "text_tokenizer.model").read_bytes() == (
        base.path / "text_tokenizer.model"
    ).read_bytes()
    assert load(run.path, TokenizerPipeline).fingerprint == load(base.path, TokenizerPipeline).fingerprint


def import_error(capsys, *words):
    assert cli.main(["import", *map(str, words)]) == 1
    return capsys.readouterr().err


def test_invalid_imports_are_rejected(tmp_path, tokenizers, capsys):
    """Missing files, files of another model, and flags that do not fit; no run is written."""
    out = tmp_path / "run"
    to = ["--out", out]
    malevich = GOLDEN / "rudalle" / "pytorch_model_v3.bin"
    text, small = ["--text-tokenizer", GOLDEN / "rudalle" / "bpe.model"], ["--heads", 2]
    fit = ["--image-tokenizer", tokenizers(12, 12)]
    assert "Expected --text-tokenizer for ruDALL-E, got none. Use the bpe.model" in import_error(
        capsys, "rudalle", malevich, *to, *small, *fit
    )
    message = import_error(capsys, "rudalle", malevich, *to, *text, *small)
    assert "Expected --image-tokenizer with 12 codes and a grid of 12 x 12 for rudalle" in message
    wrong = import_error(
        capsys, "rudalle", malevich, *to, *text, *small, "--image-tokenizer", tokenizers(24, 4)
    )
    assert "Expected model.image_vocab 24, that of the image tokenizer" in wrong
    unversioned = shutil.copy(malevich, tmp_path / "pytorch_model.bin")
    assert "Use --version v3" in import_error(capsys, "rudalle", unversioned, *to, *text, *small, *fit)
    assert "Expected ruDALL-E with a tensor text_embeddings.weight" in import_error(
        capsys, "rudalle", GOLDEN / "llamagen" / "c2i_tiny_64.pt", *to, *text, "--version", "v3", *fit
    )
    assert "Expected no --version for the family llamagen" in import_error(
        capsys, "llamagen", malevich, *to, "--version", "v2"
    )
    assert "heads 5" in import_error(capsys, "rudalle", malevich, *to, *text, "--heads", 5, *fit)
    broken = tmp_path / "bpe.model"
    broken.write_text("1 2\n3")
    assert f"{broken}: Expected a model of YouTokenToMe" in import_error(
        capsys, "rudalle", malevich, *to, "--text-tokenizer", broken, *small, *fit
    )

    mini = shutil.copytree(GOLDEN / "dalle_mini", tmp_path / "mini")
    (mini / "vocab.json").unlink()
    assert "Expected a directory with flax_model.msgpack, config.json, vocab.json" in import_error(
        capsys, "dalle-mini", mini, *to
    )
    shutil.copy(GOLDEN / "dalle_mini" / "vocab.json", mini)
    settings = json.loads((mini / "config.json").read_text())
    (mini / "config.json").write_text(json.dumps({**settings, "ln_positions": "swinv2"}))
    assert "ln_positions to be 'normformer', got 'swinv2'" in import_error(capsys, "dalle-mini", mini, *to)
    lines = tmp_path / "names.txt"
    lines.write_text("one\ntwo")
    tiny = ["llamagen", GOLDEN / "llamagen" / "c2i_tiny_64.pt", *to, "--image-size", 64, "--heads", 2]
    assert "one per line, got 2 lines" in import_error(capsys, *tiny, "--text-tokenizer", lines)
    assert "Expected no --t5 for a class-conditional model" in import_error(capsys, *tiny, "--t5", tmp_path)
    assert not out.exists()


def test_invalid_text_encoders_are_rejected(tmp_path, tokenizers, capsys):
    """A T5 that is missing, incomplete, or of another size than the model needs; no run is written."""
    files, out, folder = GOLDEN / "llamagen_t2i", tmp_path / "run", tmp_path / "t5"
    gpt = ["llamagen", files / "t2i_tiny_64.pt", "--out", out, "--image-size", 64, "--heads", 2]
    gpt += ["--image-tokenizer", tokenizers(24, 4)]
    assert "Expected --t5 DIR for the text-conditional model" in import_error(capsys, *gpt)
    assert "Expected no --text-tokenizer for a text-conditional model" in import_error(
        capsys, *gpt, "--t5", folder, "--text-tokenizer", files / "x"
    )
    assert f"got no file {folder / 'config.json'}" in import_error(capsys, *gpt, "--t5", folder)
    tensors = {
        name: np.asarray(tensor.read())
        for name, tensor in encoders.read_t5_encoder(files / "flan-t5").items()
    }
    norm, wide = (
        "encoder.block.1.layer.0.layer_norm.weight",
        "encoder.block.1.layer.1.DenseReluDense.wi_1.weight",
    )
    nan = np.where(np.arange(16) == 7, np.nan, tensors[norm]).astype(np.float32)
    narrow = {  # a complete encoder of half the width
        name: x[..., :8] if x.shape[-1] == 16 and not name.endswith("bias.weight") else x
        for name, x in tensors.items()
    }
    narrow = {name: x[:8] if len(x) == 16 and x.ndim == 2 else x for name, x in narrow.items()}

    def error_of(settings=None, drop=(), spiece=True, **changed):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps({"feed_forward_proj": "gated-gelu"} | (settings or {}))
        )
        if spiece:
            shutil.copy(files / "flan-t5" / "spiece.model", folder)
        selected = {name: x for name, x in (tensors | changed).items() if name not in drop}
        save_file(selected, folder / "model.safetensors")
        return import_error(capsys, *gpt, "--t5", folder)

    assert "feed_forward_proj to be 'gated-gelu', got 'relu'" in error_of({"feed_forward_proj": "relu"})
    assert f"without tensors {wide}" in error_of(drop=[wide])
    assert "Expected the encoder of a T5 v1.1 (Flan-T5) with a tensor shared.weight" in error_of(
        drop=["shared.weight"]
    )
    assert "with other tensors encoder.more" in error_of(**{"encoder.more": nan})
    assert f"finite values in tensor t5:{norm}" in error_of(**{norm: nan})
    assert f"got t5:{wide} (20, 8)" in error_of(**{wide: tensors[wide][:, :8].copy()})
    assert (
        f"Expected a T5 of width 16 for {files / 't2i_tiny_64.pt'}, got width 8 in {folder}. Use flan-t5-xl"
        in error_of(**narrow)
    )
    assert f"no file {folder / 'spiece.model'}" in error_of(spiece=False)
    (folder / "spiece.model").write_bytes(b"no model")
    assert f"{folder / 'spiece.model'}: Expected a sentencepiece model" in import_error(
        capsys, *gpt, "--t5", folder
    )
    assert "at most 20 pieces, the size of the T5, got 26" in error_of(
        **{"shared.weight": tensors["shared.weight"][:20].copy()}
    )
    assert not out.exists() and not list(tmp_path.glob(".*.tmp"))
