"""From options to data: source, split, tokenizer, token cache, packed sequences."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headway.data.cache import open_cache
from headway.data.loader import Stream
from headway.data.options import DataOptions
from headway.data.packing import TokenSet
from headway.data.sources import open_source
from headway.data.splits import Corpus, stable_share, survey
from headway.data.tokenizers import ByteTokenizer, Tokenizer, cached_bpe, load_tokenizer

BPE_TEXT_BYTES = 256 << 20
"""A BPE is trained on at most about this much text, whole documents chosen by a stable hash."""


@dataclass
class Data:
    """What a language model is trained and judged on."""

    options: DataOptions
    seed: int
    tokenizer: Tokenizer
    train: TokenSet
    validation: TokenSet
    corpora: dict[str, Corpus]
    notes: list[str] = field(default_factory=list)
    """What a reader of the results should know: files left out, how the text was split, a tokenizer that loses text."""

    @property
    def validation_bytes(self) -> int:
        """UTF-8 bytes of the whole validation text."""
        return self.validation.text_bytes

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the validation text per target token; bits per byte = loss in nats / ln 2 / this."""
        return self.validation.text_bytes / self.validation.targets

    @property
    def unique_tokens(self) -> int:
        """Target tokens of one pass over the training text."""
        return self.train.targets

    def stream(self, *, batch: int, micro_batch: int | None = None, rank: int = 0, world: int = 1) -> Stream:
        """Training batches, in the order of the data's seed and within its passes."""
        return Stream(
            self.train,
            batch=batch,
            micro_batch=micro_batch,
            seed=self.seed,
            rank=rank,
            world=world,
            max_passes=self.options.max_passes,
            on_exhausted=self.options.on_exhausted,
        )

    def texts(self, side: str) -> Iterator[str]:
        """The documents of ``train`` or ``validation``; a long one in several pieces."""
        return (document.text for document in self.corpora[side].documents())

    def text_bytes(self, side: str, limit: int | None = None) -> bytes:
        """The documents of one side joined by line ends, at most ``limit`` bytes of them: for models that read
        bytes.
        """
        parts: list[bytes] = []
        size = 0
        for document in self.corpora[side].documents():
            raw = document.text.encode("utf-8")
            parts += [raw] if document.continues or not parts else [b"\n", raw]
            size += len(raw) + 1
            if limit is not None and size >= limit:
                break
        return b"".join(parts)[:limit]


def cache_folder(options: DataOptions) -> Path:
    """Where token caches and trained tokenizers are kept."""
    return Path(options.cache or os.environ.get("HEADWAY_CACHE") or "~/.cache/headway").expanduser()


def build_data(options: DataOptions, seed: int) -> Data:
    """The data that ``options`` describe; what a text costs once (reading, BPE, tokens) is kept in the cache folder.

    Args:
        seed: fixes the order of training, nothing else: split and tokenizer depend on the text alone.

    Raises:
        DataError: the text is missing, empty, damaged or of another kind than said.
        HeadwayError: the cache folder cannot be written.
    """
    folder = cache_folder(options)
    corpora = _corpora(options, folder / "surveys")
    notes = []
    for corpus in {id(c.source): c for c in corpora.values()}.values():
        if corpus.survey.skipped:
            notes.append(f"{corpus.survey.skipped} files of {corpus.source.name} are not UTF-8 and were left out")
        if corpus.survey.piece:
            notes.append(f"{corpus.source.name} has few documents: validation is some of their paragraphs")
    tokenizer = _tokenizer(options, corpora["train"], folder, notes)
    sets = {}
    for side, corpus in corpora.items():
        cache = open_cache(corpus, tokenizer, folder / "tokens")
        sets[side] = TokenSet(cache, options.sequence, tokenizer.eos, options.mask_documents)
    if not sets["validation"].cache.lossless:
        notes.append(
            "the tokenizer does not give the text back exactly: bits per byte count the bytes of the original text"
        )
    return Data(options, seed, tokenizer, sets["train"], sets["validation"], corpora, notes)


def _corpora(options: DataOptions, memo: Path) -> dict[str, Corpus]:
    source = open_source(options)
    if options.validation_path is None:
        found = survey(source, options.validation_fraction, memo)
        return {"train": Corpus(source, found, "train"), "validation": Corpus(source, found, "validation")}
    other = open_source(options, validation=True)
    return {
        "train": Corpus(source, survey(source, None, memo), "all"),
        "validation": Corpus(other, survey(other, None, memo), "all"),
    }


def _tokenizer(options: DataOptions, train: Corpus, folder: Path, notes: list[str]) -> Tokenizer:
    if options.tokenizer == "byte":
        return ByteTokenizer()
    if options.tokenizer != "bpe":
        return load_tokenizer(options.tokenizer)
    share = min(1.0, BPE_TEXT_BYTES / train.survey.bytes)
    if share < 1:
        notes.append(f"the tokenizer was trained on {share:.1%} of the training text")
    texts: Any = (d.text for d in train.documents() if share == 1 or stable_share(f"bpe/{d.id}") < share)
    tokenizer = cached_bpe(texts, options.vocab, f"{train.key}/{share!r}", folder / "tokenizers")
    if tokenizer.vocab < options.vocab:
        notes.append(f"the text supports only {tokenizer.vocab} of the {options.vocab} tokens of data.vocab")
    return tokenizer
