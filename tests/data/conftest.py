"""Fixtures of the tests of data loading."""

import pytest
from data_files import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("text") / "bpe.model")
