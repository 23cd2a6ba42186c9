"""Options of ``data:`` for text: where it is, how it is split, cut into tokens and packed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from headway.core.options import Options
from headway.core.units import Count

NEEDS_PATH = ("text", "jsonl", "parquet", "datasets")


class DataOptions(Options):
    """Where the text comes from and how it becomes sequences of tokens."""

    source: Literal["python-stdlib", "text", "jsonl", "parquet", "datasets", "memory"] = "python-stdlib"
    """Kind of source; `python-stdlib` is the library of the running interpreter, `memory` is `documents`."""
    path: str | None = None
    """File, folder or glob (for `datasets` also a name on the Hub); looked for here, then under `$HEADWAY_DATA`."""
    documents: tuple[str, ...] | None = None
    """The texts of `source: memory`, given from Python; they are saved with the recipe, so that it can be run again."""
    field: str = Field("text", min_length=1)
    """Name of the field or column that holds the text, for `jsonl`, `parquet` and `datasets`."""
    subset: str | None = None
    """Configuration of a data set that has several, for `datasets`."""
    split: str = Field("train", min_length=1)
    """Split to train on, for `datasets`."""
    tokenizer: str = Field("bpe", min_length=1)
    """`byte`, `bpe` (trained on the training text and kept), or the path of a `tokenizer.json` or Hugging Face
    folder.
    """
    vocab: Count = Field(4096, ge=257, le=2**31)
    """Vocabulary of a trained `bpe` tokenizer, its end-of-text token included."""
    sequence: Count = Field(512, ge=1, le=2**31)
    """Tokens per packed sequence."""
    mask_documents: bool = False
    """Keep attention within each document of a packed sequence."""
    validation_fraction: float = Field(0.05, gt=0, le=0.5)
    """Share of the text kept for validation, chosen by a stable hash; not used beside `validation_path`."""
    validation_path: str | None = None
    """Validation text of the same kind as `path`; then all of `path` is trained on."""
    max_passes: int | None = Field(None, ge=1)
    """Passes over the training text before it counts as exhausted; `null` never ends it."""
    on_exhausted: Literal["repeat", "stop", "warn"] = "repeat"
    """What follows: end the run (`stop`), or say so and repeat the text (`warn`); `repeat` has no limit."""
    cache: str | None = None
    """Folder of token caches and trained tokenizers; default `$HEADWAY_CACHE` or `~/.cache/headway`."""

    @model_validator(mode="before")
    @classmethod
    def _limit(cls, raw: Any) -> Any:
        """Let each half of the pass limit bring the other."""
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        if raw.get("max_passes") is not None:
            raw.setdefault("on_exhausted", "stop")
        elif raw.get("on_exhausted") in ("stop", "warn"):
            raw["max_passes"] = 1
        return raw

    @field_validator("path", "validation_path")
    @classmethod
    def _fits_source(cls, path: str | None, info: ValidationInfo) -> str | None:
        source = info.data.get("source")
        if path is not None and source in ("python-stdlib", "memory"):
            raise ValueError(f"expected no path, since source: {source} has none")
        if info.field_name == "path" and source in NEEDS_PATH and not path:
            raise ValueError(f"expected a path for source: {source}")
        if path == "":
            raise ValueError("expected a path or null")
        return path

    @field_validator("documents")
    @classmethod
    def _in_memory(cls, documents: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        if (documents is None) == (info.data.get("source") == "memory"):
            raise ValueError("expected a list of texts with source: memory, and only there")
        return documents

    @field_validator("on_exhausted")
    @classmethod
    def _fits_limit(cls, choice: str, info: ValidationInfo) -> str:
        if choice == "repeat" and info.data.get("max_passes") is not None:
            raise ValueError(f"expected stop or warn, since max_passes: {info.data['max_passes']} sets a limit")
        return choice
