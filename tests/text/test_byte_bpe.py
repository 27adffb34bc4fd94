"""Tests of byte-level BPE: merges by hand, equal ids from every file format, errors for damaged files."""

import gzip
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.text.tokenizers import TextTokenizer

PRINTABLE = [
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
]  # bytes that GPT-2's table maps to themselves
LETTERS = [*map(chr, PRINTABLE), *(chr(256 + i) for i in range(68))]  # the other 68 in order
SPACE = "\u0120"  # the space in that table: byte 32 is the 33rd of the others
MERGES = ["c a", "ca t</w>", "a t</w>"]  # ids 512, 513, 514 after two rows of 256 bytes


def clip_text(merges):
    return "\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges, ""])


def hugging_face(folder, pieces, merges):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


def clip_pieces(merges):
    joined = [m.replace(" ", "") for m in merges]
    return [*LETTERS, *(c + "</w>" for c in LETTERS), *joined, "<|startoftext|>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "bpe.txt"
    path.write_text(clip_text(MERGES), encoding="utf-8")
    return TextTokenizer.load(path)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    merges = [f"{SPACE} c", f"{SPACE}c a", "a t", f"{SPACE}ca t"]
    pieces = [*LETTERS, *(m.replace(" ", "") for m in merges), "<|endoftext|>"]  # ids 256 to 260
    return TextTokenizer.load(hugging_face(tmp_path_factory.mktemp("gpt2"), pieces, merges))


def ids(tokenizer, caption, **options):
    out = tokenizer.encode(caption, text_vocab=1000, text_len=2000, **options)
    return out[out < 1000].tolist()


def byte(c):  # '!' is 0
    return ord(c) - 33


def word_end(c):
    return 256 + byte(c)


# --- ids by hand ----------------------------------------------------------------------------------------


def test_clip_merges_by_hand(clip):
    assert clip.vocab_size == 512 + 3 + 2
    assert ids(clip, "cat") == [513]  # c a t> : ca t> : cat>
    assert ids(clip, "at") == [514]
    assert ids(clip, "a") == [320]  # as in the vocabulary of CLIP
    assert ids(clip, "cats") == [512, byte("t"), word_end("s")]
    assert ids(clip, "bat") == [byte("b"), 514]
    assert ids(clip, "  A  CAT!! ") == [320, 513, byte("!"), word_end("!")]
    assert ids(clip, "cat's 12") == [513, byte("'"), word_end("s"), word_end("1"), word_end("2")]
    assert (
        ids(clip, "\u00e9")
        == [LETTERS.index("\u00c3"), 256 + LETTERS.index("\u00a9")]
        == ids(clip, "e\u0301")
    )


def test_the_earliest_merge_has_priority(tmp_path):
    (tmp_path / "v").write_text(clip_text(["a t</w>", "c a", "ca t</w>"]))
    assert ids(TextTokenizer.load(tmp_path / "v"), "cat") == [byte("c"), 512]


def test_a_merge_joins_all_its_pairs_from_the_left(tmp_path):
    (tmp_path / "v").write_text(clip_text(["a a", "aa aa"]))
    assert ids(TextTokenizer.load(tmp_path / "v"), "aaaaab") == [513, byte("a"), word_end("b")]


def test_gpt2_merges_by_hand(gpt2):
    space = LETTERS.index(SPACE)
    assert gpt2.vocab_size == 261
    assert ids(gpt2, "cat cat") == [byte("c"), 258, 259]  # c at, then " c", " ca", " cat"
    assert ids(gpt2, " cat") == [259] and ids(gpt2, "  cat") == [space, 259]
    assert ids(gpt2, "Cat  ") == [byte("C"), 258, space, space]
    assert ids(gpt2, "at's 12") == [258, byte("'"), byte("s"), space, byte("1"), byte("2")]


def test_special_pieces_are_neither_encoded_nor_decoded(clip, gpt2):
    assert 516 not in ids(clip, "<|endoftext|>") and 260 not in ids(gpt2, "<|endoftext|>")
    assert clip.decode([515, 513, 516, 999]) == "cat"


# --- laws -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(caption=st.text(max_size=40), dropout=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 2**40))
def test_round_trip(clip, gpt2, caption, dropout, seed):
    for tokenizer in (clip, gpt2):
        got = tokenizer.decode(ids(tokenizer, caption, bpe_dropout=dropout, seed=seed))
        assert got == tokenizer.normalize(caption)
    assert clip.normalize("A\u3000dog's  Tail") == "a dog 's tail"
    assert gpt2.normalize(" A dog's  Tail") == " A dog's  Tail"


def test_dropout(clip):
    assert ids(clip, "cat", bpe_dropout=1 - 1e-12) == [byte("c"), byte("a"), word_end("t")]
    found = {tuple(ids(clip, "cat cat cat", bpe_dropout=0.3, seed=s)) for s in range(40)}
    assert len(found) > 3
    assert ids(clip, "cat cat", bpe_dropout=0.3, seed=7) == ids(clip, "cat cat", bpe_dropout=0.3, seed=7)
    assert clip.count_tokens("cat cat") == 2


def test_every_file_format_gives_the_same_ids(clip, tmp_path):
    folder = hugging_face(tmp_path / "hf", clip_pieces(MERGES), MERGES)
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(clip_text(MERGES).encode()))
    clip.save(tmp_path / "run" / "text_tokenizer.model")
    paths = [
        folder,
        folder / "vocab.json",
        folder / "merges.txt",
        tmp_path / "bpe.txt.gz",
        tmp_path / "run/text_tokenizer.model",
    ]
    for path in paths:
        again = TextTokenizer.load(path)
        assert again.vocab_size == clip.vocab_size, path
        for caption in ("a cat sat, at 12!", "\u732b"):
            assert ids(again, caption) == ids(clip, caption), path
            np.testing.assert_array_equal(
                ids(again, caption, bpe_dropout=0.5, seed=3), ids(clip, caption, bpe_dropout=0.5, seed=3)
            )


def test_gpt2_is_saved_as_gpt2(gpt2, tmp_path):
    gpt2.save(tmp_path / "text_tokenizer.model")
    assert ids(TextTokenizer.load(tmp_path / "text_tokenizer.model"), "A cat  at") == ids(gpt2, "A cat  at")


@pytest.mark.skipif(
    "DALLE_JAX_CLIP_VOCAB" not in os.environ, reason="names CLIP's bpe_simple_vocab_16e6.txt.gz"
)
def test_ids_of_clip():
    tokenizer = TextTokenizer.load(os.environ["DALLE_JAX_CLIP_VOCAB"])
    assert tokenizer.vocab_size == 49_408
    got = tokenizer.encode("a photo of a cat", text_vocab=49_408, text_len=5)
    assert got.tolist() == [320, 1125, 539, 320, 2368]


# --- damaged files ------------------------------------------------------------------------------------------


def test_damaged_vocabularies_are_rejected(clip, tmp_path):
    good = clip_pieces(MERGES)

    def assert_rejected(match, pieces=good, merges=MERGES):
        with pytest.raises(ValueError, match=match):
            TextTokenizer.load(hugging_face(tmp_path / "hf", pieces, merges))

    assert_rejected("without the piece 'b' of a byte", [p for p in good if p != "b"])
    assert_rejected("Expected two pieces .*as merge 1, got 'cat'", merges=["cat"])
    assert_rejected(
        "Expected pieces of the vocabulary and of earlier merges as merge 1, got 'd o'", merges=["d o"]
    )
    assert_rejected("earlier merges as merge 1, got 'ca t</w>'", merges=["ca t</w>", "c a"])
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps({p: 0 for p in good}))
    with pytest.raises(ValueError, match="different integers from 0"):
        TextTokenizer.load(tmp_path / "hf")
    (tmp_path / "hf" / "vocab.json").write_text("[1]")
    with pytest.raises(ValueError, match="Expected a JSON object"):
        TextTokenizer.load(tmp_path / "hf")
    (tmp_path / "hf" / "merges.txt").unlink()
    with pytest.raises(
        ValueError, match=r"Expected a readable text vocabulary, got .*merges\.txt: No such file"
    ):
        TextTokenizer.load(tmp_path / "hf")
    for name, data, match in (
        ("a.txt.gz", gzip.compress(clip_text(MERGES).encode())[:-12], "gzip file is damaged"),
        ("tokenizer.json", b'{"model": {}}', "is of type None"),
        (
            "text_tokenizer.model",
            b'{"format": "byte pairs", "vocab": {}, "merges": [1]}',
            "no vocab or no merges",
        ),
        ("cut.json", b'{"format": ', "not JSON"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"Expected a whole text vocabulary, got .*{name}: .*{match}"):
            TextTokenizer.load(tmp_path / name)
    with pytest.raises(ValueError, match="text_vocab 516 pieces, got 517"):
        clip.encode("a", text_vocab=516, text_len=4)


# --- tokenizer.json ---------------------------------------------------------------------------------------

GPT2_MERGES = [f"{SPACE} c", f"{SPACE}c a", "a t", f"{SPACE}ca t"]
GPT2_PIECES = [*LETTERS, *(m.replace(" ", "") for m in GPT2_MERGES), "<|endoftext|>"]
CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def gpt2_file(**changes):
    model = {"type": "BPE", "vocab": {p: i for i, p in enumerate(GPT2_PIECES)}, "merges": GPT2_MERGES}
    model |= {"end_of_word_suffix": "", "continuing_subword_prefix": "", "unk_token": None}
    contents = {
        "version": "1.0",
        "normalizer": None,
        "added_tokens": [{"id": 260, "content": "<|endoftext|>"}],
    }
    contents |= {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}
    contents |= {k: v for k, v in changes.items() if k in contents}
    return contents | {"model": model | {k: v for k, v in changes.items() if k not in contents}}


def clip_file(split=CLIP_SPLIT, folds=("NFC", "Replace", "Lowercase")):
    pieces = clip_pieces(MERGES)
    model = {
        "type": "BPE",
        "vocab": {p: i for i, p in enumerate(pieces)},
        "merges": MERGES,
        "end_of_word_suffix": "</w>",
    }
    steps = [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Removed", "invert": True}]
    steps += [{"type": "ByteLevel", "add_prefix_space": False}]
    normal = {"type": "Sequence", "normalizers": [{"type": fold} for fold in folds]}
    return {
        "model": model,
        "normalizer": normal,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
    }


@pytest.mark.parametrize("pairs", [False, True])  # merges as "a b", or as ["a", "b"] in newer files
def test_tokenizer_json_gives_the_same_ids(tmp_path, clip, gpt2, pairs):
    for contents, want in ((gpt2_file(), gpt2), (clip_file(), clip)):
        if pairs:
            contents["model"]["merges"] = [merge.split(" ") for merge in contents["model"]["merges"]]
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(contents))
        for source in (path, tmp_path):  # the file, or the folder it is in
            tokenizer = TextTokenizer.load(source)
            assert tokenizer.vocab_size == want.vocab_size
            for caption in ("a cat, the cats' cat", "  two\tspaces  ", "\u732b \U0001f431 caf\xe9", "x's 12"):
                assert ids(tokenizer, caption) == ids(want, caption)
        tokenizer.save(tmp_path / "saved.model")
        assert ids(TextTokenizer.load(tmp_path / "saved.model"), "a cat") == ids(want, "a cat")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (gpt2_file(type="Unigram"), "is of type 'Unigram'"),
        (gpt2_file(ignore_merges=True), "sets ignore_merges"),
        (gpt2_file(byte_fallback=True), "sets byte_fallback"),
        (gpt2_file(normalizer={"type": "NFC"}), "unlike GPT-2's"),
        (gpt2_file(pre_tokenizer={"type": "Metaspace"}), "unlike GPT-2's"),
        (gpt2_file(pre_tokenizer=None), "unlike GPT-2's"),
        (gpt2_file(pre_tokenizer={"type": "ByteLevel", "use_regex": False}), "unlike GPT-2's"),
        (gpt2_file(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), "puts a space before"),
        (gpt2_file(end_of_word_suffix="@@"), "ends words with '@@'"),
        (clip_file(split=r"\w+|\W"), "splits captions by another pattern than CLIP's"),
        (clip_file(folds=("NFKC",)), "normalizes captions unlike CLIP's"),
        (gpt2_file(vocab={"a": 0}), "without the piece '.*' of a byte"),
    ],
)
def test_tokenizer_json_of_another_kind_is_rejected(tmp_path, contents, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=rf"got .*tokenizer\.json: .*{message}"):
        TextTokenizer.load(tmp_path / "tokenizer.json")
