"""`dalle-jax text train`."""

from command_line import json_of, refused

from dalle_jax.text.tokenizers import TextTokenizer


def test_text_train_writes_a_vocabulary(folder, tmp_path):
    result = json_of(
        "text",
        "train",
        folder,
        "--out",
        tmp_path / "v" / "text_tokenizer.model",
        "--vocab",
        300,
        "--text-len",
        2,
    )
    assert TextTokenizer.load(tmp_path / "v" / "text_tokenizer.model").vocab_size == result["pieces"] <= 300
    assert set(result["languages"]) == {"en"} and result["languages"]["en"]["cut"] >= 1
    assert "vocabulary of at least" in refused(
        "text", "train", folder, "--out", tmp_path / "x", "--vocab", 20
    )
