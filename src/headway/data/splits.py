"""Train and validation: which side a document is on depends on the document alone, through a stable hash.

A source of fewer documents than ``1 / fraction`` is split inside its documents instead, by pieces of whole paragraphs.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from headway.core.errors import DataError
from headway.core.files import write_json
from headway.data.sources import BLOCK, Document, Source

Side = Literal["train", "validation", "all"]
_FORMAT = 1


def stable_share(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` alone: BLAKE2b-64 over 2^64, the same on every machine."""
    return (
        int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") / 2.0**64
    )


def cut(text: str, size: int) -> Iterator[str]:
    """``text`` in pieces of at least ``size`` characters that end at a blank line, else at a line, else at ``4 *
    size``.
    """
    start = 0
    while len(text) - start > size:
        limit = start + 4 * size
        end = text.find("\n\n", start + size, limit)
        if end < 0:
            end = text.find("\n", start + size, limit)
        if end < 0:
            end = min(limit, len(text))
        while end < len(text) and text[end] == "\n":
            end += 1
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


@dataclass(frozen=True)
class Survey:
    """What one look at all of a source found."""

    fingerprint: str
    """BLAKE2b-128 of all names and texts."""
    documents: int
    bytes: int
    """UTF-8 bytes of all texts."""
    skipped: int
    """Files left out."""
    piece: int
    """0: documents are split as wholes; else the least characters of the pieces they are split into."""
    threshold: float
    """Documents (pieces) whose stable share is at most this are validation."""


@dataclass(frozen=True)
class Corpus:
    """One side of a surveyed source."""

    source: Source
    survey: Survey
    side: Side

    @property
    def key(self) -> str:
        """Identifies the text: the same key, the same documents."""
        rule = "" if self.side == "all" else f"{self.survey.piece}/{self.survey.threshold!r}"
        return f"{self.survey.fingerprint}/{rule}/{self.side}"

    def documents(self) -> Iterator[Document]:
        """The documents of this side, without empty ones."""
        if self.side == "all":
            return (d for d in self.source.documents() if d.text)
        return joined(self._pieces()) if self.survey.piece else self._wholes()

    def _is_here(self, share: float) -> bool:
        return (share <= self.survey.threshold) == (self.side == "validation")

    def _wholes(self) -> Iterator[Document]:
        for document in self.source.documents():
            key = document.text if self.source.split_by_text else document.id
            if document.text and self._is_here(stable_share(key)):
                yield document

    def _pieces(self) -> Iterator[Document]:
        adjacent = False  # whether the piece before was of the same document and is on this side too
        for document in self.source.documents():
            adjacent = adjacent and document.continues
            for number, piece in enumerate(cut(document.text, self.survey.piece)):
                here = self._is_here(stable_share(piece))
                if here:
                    yield Document(f"{document.id}#{number}", piece, adjacent)
                adjacent = here


def joined(pieces: Iterator[Document], limit: int = BLOCK) -> Iterator[Document]:
    """Pieces that continue each other joined again, up to about ``limit`` characters."""
    held: list[Document] = []
    length = 0
    for piece in pieces:
        if held and (not piece.continues or length + len(piece.text) > limit):
            yield held[0]._replace(text="".join(p.text for p in held))
            held, length = [], 0
        held.append(piece)
        length += len(piece.text)
    if held:
        yield held[0]._replace(text="".join(p.text for p in held))


def survey(source: Source, fraction: float | None, memo: Path) -> Survey:
    """Read all of ``source`` once and settle its split; kept in folder ``memo`` as long as the source's signature
    holds.

    Args:
        fraction: share for validation; None for no split.

    Raises:
        DataError: the source holds no text, or too little to be split, or is damaged.
    """
    signature = source.signature()
    file = None
    if signature is not None:
        key = hashlib.blake2b(json.dumps([_FORMAT, signature, fraction]).encode(), digest_size=16).hexdigest()
        file = memo / f"{key}.json"
        kept = _recall(file)
        if kept is not None:
            return kept
    started = time.time()
    found = _look(source, fraction)
    if file and signature and source.signature() == signature and _settled(signature, started):
        write_json(file, asdict(found))
    return found


def _recall(file: Path) -> Survey | None:
    try:
        return Survey(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # only a memo: the source is read again


def _settled(signature: list[Any], now: float) -> bool:
    """Whether no file was changed just now: a second change within the clock's tick would go unseen."""
    times = [row[4] for part in signature if isinstance(part, list) for row in part if len(row) == 5]
    return not times or max(times) / 1e9 < now - 1.0


def _look(source: Source, fraction: float | None) -> Survey:
    digest = hashlib.blake2b(digest_size=16)
    documents = size = 0
    shares = _Shares()
    for document in source.documents():
        try:
            raw = document.text.encode("utf-8")
        except UnicodeEncodeError as error:
            what = f"holds half of a surrogate pair at character {error.start}, which UTF-8 cannot express"
            raise DataError(f"{source.name}, document {document.id}", what) from None
        for part in (document.id.encode("utf-8", "surrogateescape"), raw):
            digest.update(len(part).to_bytes(8, "big") + part)
        size += len(raw)
        if raw and not document.continues:
            documents += 1
            shares.add(stable_share(document.text if source.split_by_text else document.id))
    if not size:
        raise DataError(source.name, "holds no text")
    piece, threshold = 0, -1.0
    if fraction is not None:
        if documents < math.ceil(1 / fraction):
            piece = max(16, min(8192, size // 200))  # small enough that a twentieth of the pieces is a few
            shares = _Shares()
            for document in source.documents():
                for text in cut(document.text, piece):
                    shares.add(stable_share(text))
        if not shares.low < shares.high:
            why = "its documents are all the same" if documents > 1 else "it is too short"
            hint = "give more text, or a text of its own for validation (data.validation_path)"
            raise DataError(source.name, f"cannot be split into train and validation: {why}", hint=hint)
        # if by chance all documents fall on one side, the one with the lowest share alone is validation
        threshold = fraction if shares.low <= fraction < shares.high else shares.low
    return Survey(digest.hexdigest(), documents, size, source.skipped, piece, threshold)


class _Shares:
    """The least and the greatest stable share seen."""

    def __init__(self) -> None:
        self.low, self.high = 1.0, 0.0

    def add(self, share: float) -> None:
        self.low, self.high = min(self.low, share), max(self.high, share)
