"""The token cache: one side of a corpus as a memory-mapped stream of ids, with where its documents begin.

On disk, per corpus side and tokenizer: ``KEY.bin`` = ids (uint16 or uint32) | padding to 8 bytes | document starts
(int64) | UTF-8 bytes of each document (int64), and ``KEY.json``, its size, layout and checksum, written last.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from headway.core.errors import DataError, HeadwayError
from headway.core.fallback import fallback
from headway.core.files import checksum, whole_file, write_json
from headway.core.units import human
from headway.data.sources import Document
from headway.data.splits import Corpus
from headway.data.tokenizers import Tokenizer

_FORMAT = 1
CHECKED_BYTES = 1 << 30
"""Larger caches are checked by size alone when opened."""
_BATCH_CHARACTERS = 4 << 20


@dataclass(frozen=True)
class Header:
    """What is known about a cache file without reading it."""

    format: int
    dtype: str
    tokens: int
    documents: int
    lossless: bool
    """Whether the tokenizer gave the first documents back exactly."""
    size: int
    checksum: str


@dataclass(frozen=True)
class TokenCache:
    """A stream ``eos d0 eos d1 ... eos`` of token ids; every document has an end-of-text token on either side."""

    stream: np.ndarray
    """Ids, uint16 or uint32 ``[tokens]``, memory-mapped."""
    starts: np.ndarray
    """Where each document's first end-of-text token is, int64 ``[documents]``."""
    bytes: np.ndarray
    """UTF-8 bytes of each document's text, int64 ``[documents]``."""
    lossless: bool
    fingerprint: str
    """The same fingerprint, the same stream."""


def open_cache(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> TokenCache:
    """The cache of ``corpus`` under ``tokenizer``, built if it is not there, and again (and said) if it is damaged.

    Processes that want the same cache wait for the first of them to build it.

    Raises:
        DataError: the corpus is empty or damaged.
        HeadwayError: the folder cannot be written, or a cache is damaged and the run is strict.
    """
    key = hashlib.blake2b(f"{_FORMAT}/{corpus.key}/{tokenizer.fingerprint}".encode(), digest_size=16).hexdigest()
    file = folder / f"{key}.bin"
    found = _open(file, key)
    if isinstance(found, TokenCache):
        return found
    with _lock(file.with_suffix(".lock")):
        found = _open(file, key)  # another process may have built it while this one waited
        if isinstance(found, TokenCache):
            return found
        if found:
            fallback(f"building the token cache {file} again", found, "the time to tokenize once more")
        _build(corpus, tokenizer, file)
        found = _open(file, key)
    if not isinstance(found, TokenCache):
        raise DataError(str(file), f"was just written, yet {found or 'it is not there'}", hint="check the disk")
    return found


def _open(file: Path, key: str) -> TokenCache | str:
    """The cache, or what is wrong with it; the empty string if there is none."""
    header_file = file.with_suffix(".json")
    if not header_file.exists():
        return ""
    try:
        header = Header(**json.loads(header_file.read_text(encoding="utf-8")))
        width = np.dtype(header.dtype).itemsize
        layout = _layout(header.tokens, width, header.documents)
    except (OSError, ValueError, TypeError):
        return "its header cannot be read"
    if not file.exists():
        return "it is gone, only its header is left"
    size = file.stat().st_size
    if size != header.size or size != layout[-1]:
        return f"it has {size} bytes instead of {header.size}"
    if size < CHECKED_BYTES and checksum(file) != header.checksum:
        return "its content does not match its checksum"
    stream = np.memmap(file, dtype=header.dtype, mode="r", shape=(header.tokens,))
    starts = np.fromfile(file, dtype=np.int64, count=header.documents, offset=layout[0])
    sizes = np.fromfile(file, dtype=np.int64, count=header.documents, offset=layout[1])
    return TokenCache(stream, starts, sizes, header.lossless, key)


def _layout(tokens: int, width: int, documents: int) -> tuple[int, int, int]:
    """Offsets of the starts, of the sizes, and of the end."""
    starts = -(-tokens * width // 8) * 8
    return starts, starts + 8 * documents, starts + 16 * documents


def _build(corpus: Corpus, tokenizer: Tokenizer, file: Path) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32)
    digest = hashlib.blake2b(digest_size=16)  # as core.files.checksum, taken on the way
    starts: list[int] = []
    sizes: list[int] = []
    tokens = written = 0
    lossless = True
    progress = _Progress(corpus)
    file.with_suffix(".json").unlink(missing_ok=True)
    with whole_file(file) as out:

        def put(data: bytes) -> None:
            nonlocal written
            digest.update(data)
            out.write(data)
            written += len(data)

        end = np.array([tokenizer.eos], dtype=dtype)
        for batch in _batches(corpus.documents()):
            parts = []
            for document, ids in zip(batch, tokenizer.encode_arrays([d.text for d in batch]), strict=True):
                if len(starts) < 16 and len(document.text) < 1 << 16:
                    lossless = lossless and tokenizer.decode(ids.tolist()) == document.text
                size = len(document.text.encode("utf-8"))
                if document.continues:
                    sizes[-1] += size
                else:
                    starts.append(tokens)
                    sizes.append(size)
                    parts.append(end)
                    tokens += 1
                parts.append(ids.astype(dtype))
                tokens += len(ids)
                progress.add(size)
            put(np.concatenate(parts).tobytes())
        if not starts:
            raise DataError(corpus.source.name, f"holds no text for {corpus.side}")
        tokens += 1
        put(end.tobytes())
        layout = _layout(tokens, dtype.itemsize, len(starts))
        put(b"\0" * (layout[0] - written))
        put(np.array(starts, dtype=np.int64).tobytes())
        put(np.array(sizes, dtype=np.int64).tobytes())
    header = Header(_FORMAT, dtype.name, tokens, len(starts), lossless, written, digest.hexdigest())
    write_json(file.with_suffix(".json"), asdict(header))


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Progress:
    """A line every few seconds while a long text is tokenized."""

    def __init__(self, corpus: Corpus, every: float = 5.0) -> None:
        self.corpus, self.every = corpus, every
        self.started = self.said = time.monotonic()
        self.bytes = 0

    def add(self, size: int) -> None:
        self.bytes += size
        now = time.monotonic()
        if now - self.said >= self.every:
            self.said = now
            rate = self.bytes / (now - self.started)
            of = f" of {human(self.corpus.survey.bytes, 'B')}" if self.corpus.side != "validation" else ""
            print(
                f"headway: tokenized {human(self.bytes, 'B')}{of} for {self.corpus.side}, {human(rate, 'B')}/s",
                file=sys.stderr,
            )


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Hold ``file`` against other processes; the kernel lets go if this one dies."""
    import fcntl

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("wb")
    except OSError as error:
        raise HeadwayError(
            str(file), f"cannot be written ({error.strerror})", hint="set data.cache to a folder that can"
        ) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks; whole files keep caches sound all the same
            fallback("building the token cache without a lock", f"{file} cannot be locked ({error.strerror})",
                     "the work twice if two processes build it at once")  # fmt: skip
        yield
