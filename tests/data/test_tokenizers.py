"""Tokenizers: round trips, determinism, files that transformers loads, and what is wrong with a file.

Needs the extra hf for AutoTokenizer. Run: pytest tests/data/test_tokenizers.py
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, processors, trainers

from headway.core.errors import DataError, HeadwayError
from headway.core.fallback import FallbackLog, use_log
from headway.data.tokenizers import (
    END_OF_TEXT,
    ByteTokenizer,
    LibraryTokenizer,
    Tokenizer,
    cached_bpe,
    load_tokenizer,
    train_bpe,
)

_RNG = random.Random(0)
_WORDS = ["".join(_RNG.choices("etaoinshr", k=_RNG.randint(2, 7))) for _ in range(200)]
TEXTS = [f"def {_RNG.choice(_WORDS)}(x):\n    return x + {i}  # wörd {_RNG.choice(_WORDS)}\n" for i in range(300)]
ODD = [
    "",
    "a",
    "\n\n   \t",
    "naïve 漢字 🙂 \x00\r\n",
    "x" * 3000,
    f"quotes {END_OF_TEXT} inside",
    "".join(map(chr, range(1, 1200))),
]


@pytest.fixture(scope="module")
def bpe() -> LibraryTokenizer:
    return train_bpe(TEXTS, 400)


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: LibraryTokenizer) -> Tokenizer:
    return ByteTokenizer() if request.param == "byte" else bpe


def test_round_trip(tokenizer: Tokenizer) -> None:
    for text in [*ODD, *TEXTS[:20]]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids).replace(END_OF_TEXT, "") == text.replace(END_OF_TEXT, "")
        assert tokenizer.eos not in ids, "quoted special tokens are text"
        assert all(0 <= i < tokenizer.vocab for i in ids)
    assert tokenizer.decode(tokenizer.encode(ODD[5])) == ODD[5]
    assert tokenizer.encode_batch(ODD) == [tokenizer.encode(t) for t in ODD]
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.eos]) == "ab"


def test_bytes_are_bytes() -> None:
    assert ByteTokenizer().encode("aä") == list("aä".encode())
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"


def test_save_loads_again_and_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    file = tokenizer.save(tmp_path)
    assert file == tmp_path / "tokenizer.json"
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for path in (tmp_path, file):
        again = load_tokenizer(str(path))
        assert (again.vocab, again.eos) == (tokenizer.vocab, tokenizer.eos)
        assert again.fingerprint == tokenizer.fingerprint
    assert theirs.eos_token_id == tokenizer.eos
    assert len(theirs) == tokenizer.vocab
    for text in [*ODD[:5], ODD[6], *TEXTS[:20]]:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert again.encode(text) == ids
        assert theirs.decode(ids) == text


def test_the_same_texts_give_the_same_tokenizer(bpe: LibraryTokenizer) -> None:
    """In any order, in any process, on any number of threads."""
    shuffled = list(TEXTS)
    random.Random(0).shuffle(shuffled)
    assert train_bpe(shuffled, 400).fingerprint == bpe.fingerprint
    code = "from tests.data.test_tokenizers import TEXTS, train_bpe; print(train_bpe(TEXTS, 400).fingerprint)"
    for seed, threads in (("1", "1"), ("2", "4")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True,
                              cwd=Path(__file__).parents[2])  # fmt: skip
        assert done.stdout.strip() == bpe.fingerprint
    assert train_bpe(TEXTS[150:], 400).fingerprint != bpe.fingerprint
    assert train_bpe(TEXTS, 401).fingerprint != bpe.fingerprint


def test_bpe_compresses_and_may_fall_short_of_its_vocabulary(bpe: LibraryTokenizer) -> None:
    text = "".join(TEXTS)
    assert len(text.encode()) / len(bpe.encode(text)) > 2
    assert bpe.vocab == 400
    assert train_bpe(["ab ab"], 5000).vocab < 262


def test_the_trained_one_is_kept(tmp_path: Path, bpe: LibraryTokenizer) -> None:
    assert cached_bpe(iter(TEXTS), 400, "key", tmp_path).fingerprint == bpe.fingerprint
    assert cached_bpe(iter([]), 400, "key", tmp_path).fingerprint == bpe.fingerprint, "no text was needed"
    assert cached_bpe(iter(TEXTS), 300, "key", tmp_path).vocab == 300
    assert cached_bpe(iter(TEXTS[:10]), 400, "other", tmp_path).fingerprint != bpe.fingerprint


@pytest.mark.parametrize("damage", ["cut", "altered", "empty", "no json"])
def test_a_damaged_kept_one_is_said_and_trained_again(tmp_path: Path, bpe: LibraryTokenizer, damage: str) -> None:
    cached_bpe(iter(TEXTS), 400, "key", tmp_path)
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    file.write_text({"cut": text[:-40], "altered": text.replace("def", "dfe"), "empty": "", "no json": "[]"}[damage])
    use_log(log := FallbackLog())
    assert cached_bpe(iter(TEXTS), 400, "key", tmp_path).fingerprint == bpe.fingerprint
    assert str(file) in log.entries[0]["what"]
    assert file.read_text() == text
    use_log(FallbackLog(strict=True))
    file.write_text(text[:-40])
    with pytest.raises(HeadwayError, match="is a fallback"):
        cached_bpe(iter(TEXTS), 400, "key", tmp_path)
    use_log(FallbackLog())


# --- other people's files ---


def word_level(folder: Path, *special: str) -> Library:
    """A tokenizer of another kind, with a beginning-of-text token that its post-processor adds."""
    library = Library(models.WordLevel(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.train_from_iterator(
        TEXTS, trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", *special], show_progress=False)
    )
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    return library


def test_special_tokens_are_not_added(tmp_path: Path) -> None:
    word_level(tmp_path / "w", "</s>")
    tokenizer = load_tokenizer(str(tmp_path / "w"))
    assert tokenizer.name == "w"
    assert 1 not in tokenizer.encode("def return")
    assert tokenizer.eos == 2


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<end>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<end>", "special": True}}),
        ("special_tokens_map.json", {"eos_token": "<end>"}),
        ("config.json", {"eos_token_id": 3}),
        ("generation_config.json", {"eos_token_id": [3, 2]}),
    ],
)
def test_end_of_text_comes_from_the_folder(tmp_path: Path, file: str, content: dict) -> None:
    word_level(tmp_path, "</s>", "<end>")
    (tmp_path / file).write_text(json.dumps(content))
    assert load_tokenizer(str(tmp_path)).eos == 3
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).eos == 3
    target = tmp_path / "saved"
    load_tokenizer(str(tmp_path)).save(target)
    assert load_tokenizer(str(target)).eos == 3


def test_added_tokens_count_for_the_vocabulary(tmp_path: Path) -> None:
    library = word_level(tmp_path, "</s>")
    before = library.get_vocab_size()
    library.add_tokens(["newword"])
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).vocab == before + 1


def test_a_folder_with_only_gpt2s_files(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    train_bpe(TEXTS, 300).backend().model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": END_OF_TEXT})
    )
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("def f(x)")) == "def f(x)"


def test_what_is_wrong_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def fails(path: str) -> str:
        with pytest.raises(DataError) as caught:
            load_tokenizer(path)
        return str(caught.value)

    (tmp_path / "tok").mkdir()
    assert fails("tk").startswith("data.tokenizer: got 'tk', expected byte, bpe, or the path")
    assert "did you mean 'tok'?" in fails("tkk").lower() or "looked in" in fails("tkk")
    assert "tok: holds no tokenizer.json" in fails("tok")
    (tmp_path / "bad.json").write_text("{}")
    assert "bad.json: is not a tokenizer file (" in fails("bad.json")
    word_level(tmp_path / "none")
    assert "names no end-of-text token" in fails("none")
    shutil.copy(tmp_path / "none" / "tokenizer.json", tmp_path / "lone.json")
    assert "lone.json: names no end-of-text token" in fails("lone.json")
    (tmp_path / "none" / "config.json").write_text("{")
    assert "config.json: is not JSON" in fails("none")
