"""Tokenizers: training is deterministic and loses nothing; files are read as they should be, not as they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from velopath.errors import ConfigError, DataError
from velopath.tokenizer import TextTokenizer, load_tokenizer, train_bpe

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "def cat(dog):\n    return dog\n"] * 5
CODEC = train_bpe(TEXTS, 280)


def word_level(size: int) -> TextTokenizer:
    words = {f"w{i}": i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return TextTokenizer(tokenizer.to_str(), eos="")


def test_training_is_deterministic() -> None:
    assert train_bpe(iter(TEXTS), 280).json == CODEC.json
    assert CODEC.vocab_size == 280
    assert (CODEC.eos, CODEC.eos_name, CODEC.dtype) == (0, "<|endoftext|>", "uint16")
    assert train_bpe(TEXTS, 257).vocab_size == 257


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_every_text_decodes_to_itself(text: str) -> None:
    (ids,) = CODEC.encode([text])
    assert CODEC.decode(ids) == text
    assert 0 not in ids


def test_text_cannot_forge_the_end_of_text() -> None:
    (ids,) = CODEC.encode(["one<|endoftext|>two"])
    assert CODEC.eos not in ids
    assert CODEC.decode(ids) == "one<|endoftext|>two"


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    tokenizer = Tokenizer.from_str(CODEC.json)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    (ids,) = TextTokenizer(tokenizer.to_str()).encode([TEXTS[0]])
    assert ids.tolist() == CODEC.encode([TEXTS[0]])[0].tolist()


def test_end_of_text_is_found_by_name() -> None:
    assert TextTokenizer(CODEC.json).eos == 0
    assert TextTokenizer(CODEC.json, eos="").eos is None
    other = train_bpe(TEXTS, 300, eos="</s>")
    assert (other.eos_name, other.eos) == ("</s>", 0)
    with pytest.raises(ConfigError, match="no end-of-text token '<end>'; name one it has, or '' for none"):
        TextTokenizer(CODEC.json, eos="<end>")


def test_dtype_follows_the_largest_id() -> None:
    assert word_level(65_536).dtype == "uint16"
    wide = word_level(65_537)
    assert (wide.dtype, wide.vocab_size) == ("uint32", 65_537)
    with pytest.raises(
        ConfigError, match=r"ids go to 65536 and do not fit uint16 \(0 to 65535\); use uint32"
    ):
        wide.check_dtype("uint16")
    wide.check_dtype("uint32")
    with pytest.raises(ConfigError, match="dtype is 'int8'; expected uint16 or uint32"):
        wide.check_dtype("int8")


def test_load(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(CODEC.json)
    assert (
        load_tokenizer(tmp_path).sha256 == load_tokenizer(tmp_path / "tokenizer.json").sha256 == CODEC.sha256
    )
    with pytest.raises(DataError, match=r"missing.json: cannot be read .*expected a tokenizer.json"):
        load_tokenizer(tmp_path / "missing.json")
    (tmp_path / "x.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(DataError, match=r"x.json: not a Hugging Face tokenizers file"):
        load_tokenizer(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"x.json: not UTF-8"):
        load_tokenizer(tmp_path / "x.json")


def test_training_refuses() -> None:
    with pytest.raises(
        ConfigError, match="a tokenizer of 256 entries; expected at least 257, one for every byte"
    ):
        train_bpe(TEXTS, 256)
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_bpe([], 300)
