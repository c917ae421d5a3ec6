"""Tokenizers: a Hugging Face `tokenizers` file, or a byte-level BPE trained on the spot."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from velopath.errors import ConfigError, DataError

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
"""Names that are taken for the end-of-text token, in this order, where none is chosen."""
BYTE_ALPHABET = 256


class TextTokenizer:
    """Text to token ids and back, without special tokens, truncation or padding.

    `json` is the text of the tokenizers file, `sha256` its hash; `vocab_size` is the largest id + 1; `eos` is
    the id of the end-of-text token `eos_name`, or None. Special tokens that occur in a text are encoded as
    plain text, so that a document cannot forge a boundary.
    """

    def __init__(self, json: str, *, eos: str | None = None) -> None:
        """`eos` names the end-of-text token; None takes the first of `END_OF_TEXT` that is known; "" is none.

        Raises `DataError` when `json` is no tokenizers file, `ConfigError` when it does not know `eos`.
        """
        try:
            self._tokenizer = Tokenizer.from_str(json)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"not a Hugging Face tokenizers file (tokenizer.json): {error}") from error
        # Settings of the file that would cut or fill documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.json = json
        self.sha256 = hashlib.sha256(json.encode()).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError("the tokenizer has no entries")
        self.vocab_size = max(vocabulary.values()) + 1
        if eos is None:
            eos = next((name for name in END_OF_TEXT if name in vocabulary), "")
        if eos and eos not in vocabulary:
            raise ConfigError(
                f"the tokenizer has no end-of-text token {eos!r}; name one it has, or '' for none"
            )
        self.eos_name = eos or None
        self.eos: int | None = vocabulary[eos] if eos else None

    @property
    def dtype(self) -> str:
        """Narrowest stored type that holds every id: uint16 up to 65,536 entries, else uint32."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    def check_dtype(self, dtype: str) -> None:
        """Raise `ConfigError` unless `dtype` is uint16 or uint32 and holds every id."""
        if dtype not in ("uint16", "uint32"):
            raise ConfigError(f"dtype is {dtype!r}; expected uint16 or uint32")
        largest = int(np.iinfo(dtype).max)
        if self.vocab_size - 1 > largest:
            raise ConfigError(
                f"the tokenizer's ids go to {self.vocab_size - 1} and do not fit {dtype} (0 to {largest}); use uint32"
            )

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text, without an end-of-text token."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint32) for e in encodings]

    def decode(self, ids: NDArray[np.integer[Any]] | Sequence[int]) -> str:
        """Text of the ids, special tokens included."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))


def load_tokenizer(path: str | Path, *, eos: str | None = None) -> TextTokenizer:
    """Read a Hugging Face tokenizers file (tokenizer.json); `eos` as in `TextTokenizer`.

    Raises `DataError` naming the file when it is missing or is not one.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        return TextTokenizer(path.read_text(encoding="utf-8"), eos=eos)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}); expected a tokenizer.json", path=path) from error
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8; expected a tokenizer.json", path=path) from error
    except DataError as error:
        raise DataError(error.problem, path=path) from error


def train_bpe(texts: Iterable[str], vocab_size: int, *, eos: str = "<|endoftext|>") -> TextTokenizer:
    """Train a byte-level BPE: 256 bytes, the token `eos` with id 0, and merges up to `vocab_size` entries.

    Every text can be encoded and decodes to itself. The same texts in the same order give the same tokenizer.
    A small corpus can end with fewer entries. Raises `ConfigError` when `vocab_size` is below 257, `DataError`
    when there is no text.
    """
    least = BYTE_ALPHABET + bool(eos)
    if vocab_size < least:
        raise ConfigError(
            f"a tokenizer of {vocab_size} entries; expected at least {least}, one for every byte"
        )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos] if eos else [],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(counted(), trainer)
    if not seen:
        raise DataError("no text to train a tokenizer on")
    return TextTokenizer(trained.to_str(), eos=eos)


@contextmanager
def one_thread(alone: bool = True) -> Iterator[None]:
    """Within the block, with `alone`, tokenizers work in the calling thread and start none of their own."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if alone:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
