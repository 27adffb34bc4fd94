"""Tests of the character BPE, BART and class tokenizers: ids by hand, and results of the original programs
(golden/*_reference.py)."""

import json
from pathlib import Path

import numpy as np
import pytest

from dalle_jax.text import bart as bart_text
from dalle_jax.text import byte_bpe, char_bpe
from dalle_jax.text.bart import BartTokenizer, normalize_bart_caption
from dalle_jax.text.class_labels import ClassLabelTokenizer
from dalle_jax.text.tokenizers import TextTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"

# "ab" is 5, "abc" 6 (by merging ab and c), "bc" 7; its merge comes after "ab", so "abc" never uses it.
MODEL = "4 3\n9601 4\n97 8\n98 9\n99 10\n8 9 5\n5 10 6\n9 10 7\n1 0 2 3\n"
HF = {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "b</w>": 4, "!</w>": 5, "ab</w>": 6}


def youtokentome(**options):
    return char_bpe.char_bpe_from_youtokentome(MODEL, **options)


def test_merges_of_youtokentome_by_hand():
    pieces = youtokentome()
    assert pieces.encode("abc bc  AB\tb") == [2, 4, 6, 4, 7, 4, 5, 4, 9, 3]
    assert pieces.vocab_size == 11
    assert pieces.encode("axyb") == [2, 4, 8, 1, 9, 3]  # a run of unknown characters is one piece
    assert pieces.encode("  ") == pieces.encode("") == []
    assert youtokentome(num_bos=2).encode("b") == [2, 2, 4, 9, 3]
    assert pieces.decode([2, 4, 6, 4, 7, 1, 3]) == "abc bc"
    assert pieces.normalize("  ABC b") == "abc b"


def test_character_bpe_by_hand():
    pieces = char_bpe.char_bpe_from_vocab(HF, ["a b</w>"])
    assert pieces.encode("AB ab!") == [6, 6, 5]
    assert pieces.encode("ba") == [3, 1]  # no piece for an `a` that ends a word
    assert pieces.encode("中ab") == [1, 6]  # a Chinese character is a word
    assert pieces.encode("a\u200bb") == [6]  # zero-width marks are dropped
    assert pieces.decode([6, 5, 1]) == "ab !"


def test_dropout_skips_merges():
    pieces = youtokentome()
    assert pieces.encode("abc", bpe_dropout=1.0) == [2, 4, 8, 9, 10, 3]
    encodings = {tuple(pieces.encode("abc abc abc", bpe_dropout=0.5, seed=s)) for s in range(8)}
    assert len(encodings) > 3 and tuple(pieces.encode("abc abc abc", bpe_dropout=0.5, seed=3)) in encodings
    assert {pieces.decode(list(ids)) for ids in encodings} == {"abc abc abc"}


def test_class_labels_are_names_or_numbers():
    classes = ClassLabelTokenizer(["tench, Tinca tinca", "goldfish", "great white shark, white shark"])
    assert [classes.encode(c) for c in ("Goldfish", " white  shark", "tinca tinca", "2", "")] == [
        [1],
        [2],
        [0],
        [2],
        [],
    ]
    with pytest.raises(
        ValueError, match=r"Expected a class, got 'cat'\. Use its number in \[0, 3\), or its name, e\.g\."
    ):
        classes.encode("cat")
    with pytest.raises(ValueError, match="Expected a class, got '3'"):
        classes.encode("3")
    with pytest.raises(ValueError, match="Expected the names of one class or more"):
        ClassLabelTokenizer([])
    text = TextTokenizer(classes)
    np.testing.assert_array_equal(text.encode("", text_vocab=3, text_len=1), [3])  # the null class


# Output of the TextNormalizer of DALL-E Mini (borisdayma/dalle-mini, text.py).
@pytest.mark.parametrize(
    ("caption", "want"),
    [
        ("A red  circle.", " a red circle"),
        ("It's 1,234,567 dogs!!!", " it's 1234567 dogs"),
        ("well-known AC/DC & more", " well known ac, dc & more"),
        ("version 1.5 (new), on 12/24", " version 1.5, new, on 12/24"),
        ("soooooo good <b>bold</b> http://x.y/z now", " so good bold now"),
        ("\"quoted\" 'text' `here`", ' " quoted " text " here "'),
        ("fish &amp; chips [1]", " fish & chips"),
        ("café naïve", " cafe naive"),
        ("snake_case #tag", " snake case tag"),
        ("a 🐶 dog", " a, dog face, dog"),
        ("“curly” it’s", ' " curly " it\'s'),
        ("50% of $5 * 2", " 50 % of $ 5 * 2"),
        ("a---b ... c", " a, b, c"),
        ("x, , y,", " x, y"),
        ("we'll they're don't o'clock", " we'll they're don't o \" clock"),
    ],
)
def test_normalized_captions_equal_those_of_dalle_mini(caption, want):
    assert normalize_bart_caption(caption) == want


def bart(simplify=True):
    pairs = byte_bpe.load_byte_bpe(GOLDEN / "dalle_mini" / "vocab.json")
    return BartTokenizer(pairs, 0, 2, normalize_captions=simplify)


def test_bart_captions_have_begin_and_end():
    assert bart().encode("") == [0, 2]
    assert bart().encode("Red.") == [0, *byte_bpe.load_byte_bpe(GOLDEN / "dalle_mini").encode(" red"), 2]
    assert bart(simplify=False).encode("Red.")[1:-1] == byte_bpe.load_byte_bpe(GOLDEN / "dalle_mini").encode(
        "Red."
    )
    assert bart().decode(bart().encode("a Red circle!")) == "a red circle"
    with pytest.raises(ValueError, match=r"bos_id and eos_id in .*got 0 and 999"):
        BartTokenizer(byte_bpe.load_byte_bpe(GOLDEN / "dalle_mini"), 0, 999, normalize_captions=True)


@pytest.mark.parametrize(
    "make",
    [
        youtokentome,
        lambda: char_bpe.char_bpe_from_vocab(HF, ["a b</w>"]),
        bart,
        lambda: ClassLabelTokenizer(["abc", "b"]),
    ],
)
def test_a_saved_vocabulary_loads_with_equal_ids(tmp_path, make):
    """Through the class that runs use, from bytes and from a file."""
    own = make()
    TextTokenizer(own).save(tmp_path / "text_tokenizer.model")
    loaded = TextTokenizer.load(tmp_path / "text_tokenizer.model")
    assert loaded.vocab_size == own.vocab_size
    for text in (loaded, TextTokenizer(own.to_bytes())):
        np.testing.assert_array_equal(
            text.encode("abc", text_vocab=400, text_len=8),
            TextTokenizer(own).encode("abc", text_vocab=400, text_len=8),
        )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "Expected a model of YouTokenToMe"),
        ("hello world", "Expected a model of YouTokenToMe"),
        (MODEL.replace("4 3", "4 4", 1), "do not match the counts of the first line"),
        (MODEL.replace("5 10 6\n", ""), "do not match the counts of the first line"),
        (MODEL.replace("9601 4", "95 4"), "Expected ▁"),
        (MODEL.replace("8 9 5", "6 9 5"), "merge 1 to join pieces of earlier merges, got 6 and 9"),
        (MODEL.replace("1 0 2 3", "1 0 -1 -1"), "Expected pieces for unknown, begin and end"),
        (MODEL.replace("97 8", "9999999 8"), "Expected a model of YouTokenToMe"),
    ],
)
def test_damaged_models_of_youtokentome_are_rejected(text, match):
    with pytest.raises(ValueError, match=match):
        char_bpe.char_bpe_from_youtokentome(text)


def test_damaged_vocabularies_are_rejected():
    with pytest.raises(ValueError, match=r"merge 1 to have pieces of the vocabulary, got 'a c'"):
        char_bpe.char_bpe_from_vocab(HF, ["a c"])
    with pytest.raises(ValueError, match=r"Expected the piece \[UNK\]"):
        char_bpe.char_bpe_from_vocab({"a": 0}, [])
    with pytest.raises(ValueError, match="Expected integers as ids"):
        char_bpe.char_bpe_from_vocab({**HF, "z": "1"}, [])
    data = json.loads(youtokentome().to_bytes())
    for name in ("merges", "characters", "size", "before"):
        broken = json.dumps({k: v for k, v in data.items() if k != name}).encode()
        with pytest.raises(
            ValueError, match=rf"Expected a whole vocabulary of character pairs, got KeyError\('{name}'\)"
        ):
            char_bpe.parse_char_bpe(broken)
    with pytest.raises(ValueError, match="rule out of char-bpe, youtokentome, got 'x'"):
        char_bpe.parse_char_bpe(json.dumps({**data, "rule": "x"}).encode())
    with pytest.raises(ValueError, match=r"integer ids in \[0, 3\)"):
        char_bpe.parse_char_bpe(json.dumps({**data, "size": 3}).encode())
    with pytest.raises(ValueError, match="Expected a whole vocabulary of BART, got"):
        bart_text.parse_bart(bart().to_bytes().replace(b'"pairs"', b'"pears"'))
