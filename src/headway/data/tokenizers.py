"""Tokenizers: bytes, a byte-level BPE trained on the training text, or any file of the ``tokenizers`` library."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headway.core.errors import DataError, require
from headway.core.fallback import fallback
from headway.core.files import write_json, write_text
from headway.data.paths import locate, looked_in

END_OF_TEXT = "<|endoftext|>"
_GUESSES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
_FOLDER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "added_tokens.json")


class Tokenizer(ABC):
    """Text to token ids and back."""

    name: str
    vocab: int
    """One more than the greatest id: the least vocabulary a model for it may have."""
    eos: int
    """The end-of-text token, which never comes out of `encode`."""

    @property
    def fingerprint(self) -> str:
        """The same fingerprint, the same ids for every text."""
        return hashlib.blake2b(f"{self.eos}\n{self.backend().to_str()}".encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens; text that looks like a special token is encoded as text."""
        return self.encode_arrays([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts at once, on all cores."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    @abstractmethod
    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_batch` as integer arrays."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""

    @abstractmethod
    def backend(self) -> Any:
        """The same as a ``tokenizers.Tokenizer``."""

    def save(self, folder: str | Path) -> Path:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which ``transformers.AutoTokenizer`` loads; returns
        the first.
        """
        folder = Path(folder)
        file = folder / "tokenizer.json"
        write_text(file, self.backend().to_str(pretty=True))
        self._save_config(folder)
        return file

    def _save_config(self, folder: Path) -> None:
        end = self.backend().id_to_token(self.eos)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "clean_up_tokenization_spaces": False}
        write_json(folder / "tokenizer_config.json", config)


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 is the end of text."""

    name, vocab, eos = "byte", 257, 256

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The bytes."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes."""
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def backend(self) -> Any:
        """A BPE without merges whose ids are the byte values."""
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Library

        vocab = {character: byte for byte, character in _byte_characters().items()}
        library = Library(models.BPE(vocab=vocab, merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return library


class LibraryTokenizer(Tokenizer):
    """A ``tokenizers.Tokenizer``."""

    def __init__(self, library: Any, name: str, eos: int, folder: Path | None = None) -> None:
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True  # a text that quotes "<|endoftext|>" must not end the document
        self._library, self.name, self.eos, self._folder = library, name, eos, folder
        self.vocab = 1 + max(library.get_vocab(with_added_tokens=True).values())

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text."""
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint32) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""
        return self._library.decode(list(ids), skip_special_tokens=True)

    def backend(self) -> Any:
        """The wrapped tokenizer."""
        return self._library

    def _save_config(self, folder: Path) -> None:
        kept = [self._folder / n for n in _FOLDER_FILES if (self._folder / n).is_file()] if self._folder else []
        for file in kept:
            if file.parent.resolve() != folder.resolve():
                shutil.copyfile(file, folder / file.name)
        if not any(file.name == "tokenizer_config.json" for file in kept):
            super()._save_config(folder)


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level tokenizers (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def train_bpe(texts: Iterable[str], vocab: int) -> LibraryTokenizer:
    """A byte-level BPE of ``vocab`` tokens, id 0 the end of text; the same texts, in any order, give the same
    tokenizer.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(_byte_characters().values()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return LibraryTokenizer(library, f"bpe-{library.get_vocab_size()}", 0)


def cached_bpe(texts: Iterable[str], vocab: int, key: str, folder: Path) -> LibraryTokenizer:
    """`train_bpe`, kept in ``folder`` under ``key`` (which identifies the texts)."""
    from tokenizers import Tokenizer as Library
    from tokenizers import __version__

    name = hashlib.blake2b(f"bpe/{key}/{vocab}/{__version__}".encode(), digest_size=16).hexdigest()
    file = folder / f"{name}.json"
    if file.exists():
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            if _digest(kept["tokenizer"]) == kept["checksum"]:
                library = Library.from_str(kept["tokenizer"])
                return LibraryTokenizer(library, f"bpe-{library.get_vocab_size()}", 0)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        fallback(f"training the tokenizer {file} again", "the kept one is damaged", "some seconds")
    trained = train_bpe(texts, vocab)
    text = trained.backend().to_str()
    write_json(file, {"checksum": _digest(text), "tokenizer": text})
    return trained


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def load_tokenizer(path: str) -> LibraryTokenizer:
    """The tokenizer of a ``tokenizer.json`` or a Hugging Face folder.

    Raises:
        DataError: there is none, it cannot be read, or it names no end-of-text token.
    """
    from tokenizers import Tokenizer as Library

    found = locate(path)
    if found is None:
        raise DataError("data.tokenizer", got=path, expected="byte, bpe, or the path of a tokenizer.json or its folder",
                        hint=looked_in(path))  # fmt: skip
    folder = found if found.is_dir() else found.parent
    file = found / "tokenizer.json" if found.is_dir() else found
    if not file.is_file():
        library, name = _slow(folder), folder.name
    else:
        try:
            library = Library.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise DataError(str(file), f"is not a tokenizer file ({error})") from None
        name = folder.name if file.name == "tokenizer.json" else file.stem
    siblings = folder if file.name == "tokenizer.json" else None
    return LibraryTokenizer(library, name, _end_of_text(library, siblings, file), siblings)


def _slow(folder: Path) -> Any:
    """Folders of older models have only the vocabulary; transformers can turn most of them into a tokenizer."""
    transformers = require("transformers", "hf", str(folder))
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), use_fast=True).backend_tokenizer
    except Exception as error:  # whatever its converters raise
        detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(str(folder), f"holds no tokenizer.json, and none can be made ({detail})") from None


def _end_of_text(library: Any, folder: Path | None, file: Path) -> int:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _json(folder, name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and library.token_to_id(token) is not None:
            return library.token_to_id(token)
    for name in ("generation_config.json", "config.json"):
        number = _json(folder, name).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and library.id_to_token(number) is not None:
            return number
    for token in _GUESSES:
        if library.token_to_id(token) is not None:
            return library.token_to_id(token)
    raise DataError(
        str(file),
        "names no end-of-text token",
        hint="put eos_token into the tokenizer_config.json beside tokenizer.json",
    )


def _json(folder: Path | None, name: str) -> dict[str, Any]:
    if folder is None or not (folder / name).is_file():
        return {}
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(str(folder / name), f"is not JSON ({error})") from None
    return value if isinstance(value, dict) else {}
