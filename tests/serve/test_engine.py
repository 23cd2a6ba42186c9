"""Generation: greedy text against transformers, sampling against its distribution, streaming, stop strings, limits.

Needs: transformers, as the independent reference; random weights, no network.
Run: pytest tests/serve/test_engine.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.core.errors import HeadwayError, ModelError
from headway.core.fallback import FallbackLog, use_log
from headway.data.tokenizers import ByteTokenizer
from headway.models.build import build_model
from headway.models.config import GPT2Config, LlamaConfig, TransformersConfig
from headway.models.hf import load_hf
from headway.serve.engine import generate, generate_text, sample, text_of, until
from tests.models.references import CASES, reference

SMALL = LlamaConfig(hidden=32, layers=2, heads=4, kv_heads=2, vocab=257, context=64)


@pytest.fixture(autouse=True)
def fallbacks() -> FallbackLog:
    log = FallbackLog()
    use_log(log)
    return log


@pytest.mark.parametrize(
    "case", ["llama-tied", "llama-llama3", "mistral-window", "qwen2-windows", "qwen3-windows", "gpt2"]
)
def test_64_greedy_tokens_with_and_without_cache_and_in_transformers(case: str, tmp_path: Path) -> None:
    kind, changes = CASES[case]
    length = {} if kind == "gpt2" else {"max_position_embeddings": 128}
    theirs = reference(kind, **changes, **length)
    theirs.save_pretrained(tmp_path)
    ours = load_hf(tmp_path)
    prompt = [5, 40, 13, 8, 96, 21, 2, 60, 33, 7]
    with_cache = list(generate(ours, prompt, max_new_tokens=64, temperature=0))
    without = list(generate(ours, prompt, max_new_tokens=64, temperature=0, use_cache=False))
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert with_cache == without == expected[0, len(prompt) :].tolist()
    assert len(with_cache) == 64
    assert len(set(with_cache)) > (1 if "tied" in case else 3)  # the text is not one token over and over


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "mamba"])
def test_64_greedy_tokens_of_every_kind_of_model(family: str, tmp_path: Path) -> None:
    prompt = list(range(3, 11))
    if family in ("llama", "gpt2"):
        kind: Any = LlamaConfig if family == "llama" else GPT2Config
        model = build_model(kind(hidden=32, layers=2, heads=4, vocab=97, context=80), seed=0)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    else:
        changes: dict[str, Any] = {"max_position_embeddings": 80}
        changes |= {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "mamba": {"state_size": 4}}.get(family, {})
        reference(family, **changes).save_pretrained(tmp_path)
        model = build_model(TransformersConfig(path=str(tmp_path)), seed=0)
    options: dict[str, Any] = {"max_new_tokens": 64, "temperature": 0}
    tokens = list(generate(model, prompt, **options))
    assert len(tokens) == 64 and tokens == list(generate(model, prompt, **options, use_cache=False))


def test_a_model_without_a_cache_says_so_and_goes_on(tmp_path: Path, fallbacks: FallbackLog) -> None:
    reference("rwkv", attention_hidden_size=32, context_length=64).save_pretrained(tmp_path)
    model = build_model(TransformersConfig(path=str(tmp_path)), seed=0)
    assert len(list(generate(model, [1, 2], max_new_tokens=3, temperature=0))) == 3
    assert [entry["what"] for entry in fallbacks.entries] == ["generation without a cache"]


# Sampling.


def test_the_seed_decides_and_the_global_generator_stays_as_it_was() -> None:
    model = build_model(SMALL, seed=0)
    before = torch.get_rng_state()
    runs = [list(generate(model, [1, 2], max_new_tokens=20, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert runs[0] == runs[1] != runs[2]


def frequencies(logits: torch.Tensor, temperature: float, top_p: float, top_k: int | None) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    counts = Counter(sample(logits, temperature, top_p, top_k, generator) for _ in range(4000))
    return {token: count / 4000 for token, count in counts.items()}


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "kept"),
    [
        (1.0, 1.0, None, [0, 1, 2, 3]),
        (2.0, 1.0, None, [0, 1, 2, 3]),
        (1.0, 1.0, 2, [1, 3]),
        (1.0, 0.8, None, [1, 3]),  # 0.5 + 0.3 is just enough
        (1.0, 0.81, None, [1, 3, 0]),
        (1.0, 0.5, None, [1]),
        (1.0, 1e-9, None, [1]),
        (1.0, 0.7, 3, [1, 3]),  # of the three, 0.5 / 0.95 = 0.53 and 0.3 / 0.95 = 0.32
        (1.0, 1.0, 100, [0, 1, 2, 3]),
    ],
)
def test_sampling_follows_the_distribution(
    temperature: float, top_p: float, top_k: int | None, kept: list[int]
) -> None:
    probabilities = torch.tensor([0.15, 0.5, 0.05, 0.3])
    expected = torch.zeros(4)
    expected[kept] = probabilities[kept] ** (1 / temperature)
    expected /= expected.sum()
    found = frequencies(probabilities.log(), temperature, top_p, top_k)
    assert set(found) == set(kept)
    for token in kept:
        assert abs(found[token] - float(expected[token])) < 0.03  # four standard errors


def test_extreme_logits_and_temperatures() -> None:
    logits = torch.tensor([1e30, -1e30, 0.0])
    assert sample(logits, 1e-30, 1.0, None) == sample(logits, 0, 1.0, None) == 0
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match="logits are not finite"):
            sample(torch.tensor([0.0, bad]), 1.0, 1.0, None)


# Limits and arguments.


def test_generation_ends_at_the_context() -> None:
    model = build_model(SMALL, seed=0)
    assert len(list(generate(model, [1] * 60, max_new_tokens=100))) == 4
    assert len(list(generate(model, [1] * 63, max_new_tokens=100))) == 1
    assert list(generate(model, [1] * 63, max_new_tokens=0)) == []


def test_long_prompts_are_refused_or_cut_out_loud(fallbacks: FallbackLog) -> None:
    model = build_model(SMALL, seed=0)
    with pytest.raises(ModelError, match=r"prompt: has 64 tokens.*context of 64.*long_prompt='truncate'"):
        generate(model, [1] * 64, max_new_tokens=1)
    prompt = [i % 257 for i in range(100)]
    cut = list(generate(model, prompt, max_new_tokens=50, temperature=0, long_prompt="truncate"))
    assert cut == list(generate(model, prompt[-32:], max_new_tokens=50, temperature=0)) and len(cut) == 32
    assert fallbacks.entries[0]["what"] == "the last 32 tokens of the prompt"
    use_log(FallbackLog(strict=True))
    with pytest.raises(HeadwayError, match="is a fallback"):
        generate(model, prompt, max_new_tokens=1, long_prompt="truncate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature: got -1.0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"top_p": 0.0}, r"top_p: got 0.0, expected a share"),
        ({"top_p": 1.5}, r"top_p: got 1.5"),
        ({"top_k": 0}, "top_k: got 0, expected at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens: got -1"),
        ({"tokens": []}, "prompt: is empty"),
        ({"tokens": [1, 257]}, r"prompt: has a token outside.*got 257, expected numbers below 257"),
        ({"tokens": [-1]}, "got -1"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(options: dict[str, Any], message: str) -> None:
    given = {"tokens": [1], "max_new_tokens": 5, **options}
    with pytest.raises(ModelError, match=message):
        generate(build_model(SMALL, seed=0), **given)


def test_stop_tokens_end_the_text_and_the_model_returns_to_its_mode() -> None:
    model = build_model(SMALL.model_copy(update={"dropout": 0.5}), seed=0)
    assert model.training
    text = list(generate(model, [1, 2, 3], max_new_tokens=20, seed=4))
    assert model.training
    stop = text[7]
    assert list(generate(model, [1, 2, 3], max_new_tokens=20, seed=4, stop_tokens=[stop])) == text[: text.index(stop)]
    stream = generate(model, [1, 2, 3], max_new_tokens=20, seed=4)
    assert next(stream) == text[0] and not model.training
    stream.close()  # a reader that goes away in mid-text leaves no trace either
    assert model.training


def test_a_diverged_model_is_reported() -> None:
    model = build_model(SMALL, seed=0)
    model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        next(generate(model, [1], max_new_tokens=1))


# Text.


class Scripted:
    """A model that says what it is told, token by token, whatever it is asked."""

    plain_head, vocab, context, training = False, 257, None, False

    def __init__(self, script: bytes) -> None:
        self.script = [*script, 256]
        self.asked: list[list[int]] = []

    def parameters(self) -> Iterator[torch.Tensor]:
        return iter([torch.zeros(1)])

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...

    def new_cache(self, batch: int, length: int) -> None: ...

    def __call__(self, tokens: torch.Tensor, cache: Any = None) -> torch.Tensor:
        self.asked.append(tokens[0].tolist())
        logits = torch.zeros(1, 1, 257)
        logits[0, 0, self.script[len(self.asked) - 1]] = 100
        return logits


BYTES = ByteTokenizer()
HARD = "aé€😀b\n漢字\u200d👨‍👩‍👧 ende\ufffd!"


def pieces(script: bytes, **options: Any) -> list[str]:
    return list(generate_text(Scripted(script), BYTES, "x", max_new_tokens=500, temperature=0, **options))


def test_characters_of_several_bytes_come_whole() -> None:
    got = pieces(HARD.encode())
    assert "".join(got) == HARD
    assert got[:4] == ["a", "é", "€", "😀"]
    assert all(piece for piece in got)


def test_bytes_that_are_no_text_come_as_the_tokenizer_shows_them() -> None:
    for script in (
        b"\x80\x80a",
        b"a\xc3",
        b"\xf0\x9f\x98",
        b"\xc3\xc3\xa9\xe2\x82",
        b"\xff\xfe ok \xe2\x28\xa1 \xf0\x9f",
    ):
        assert "".join(pieces(script)) == script.decode("utf-8", "replace"), script


def test_random_bytes_stream_to_the_same_text_as_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        script = bytes(torch.randint(0, 256, (12,), generator=generator).tolist())
        assert "".join(text_of(BYTES, iter(script), [104])) == script.decode("utf-8", "replace"), script


def test_tokenizers_that_treat_the_first_token_in_their_own_way() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # As Llama's: a space is part of the next word's token, and is dropped at the beginning of a text.
    library = Tokenizer(models.WordLevel({"\u2581the": 0, "\u2581cat": 1, "s": 2}, unk_token="s"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()

    class Words:
        eos, vocab = None, 3

        def decode(self, tokens: list[int]) -> str:
            return library.decode(tokens)

    assert list(text_of(Words(), iter([1, 2, 0, 1]), [0])) == [" cat", "s", " the", " cat"]
    assert list(text_of(Words(), iter([1, 0]))) == ["cat", " the"]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("hello world", ["wor"], "hello "),
        ("hello world", ["xyz"], "hello world"),
        ("aab", ["ab"], "a"),
        ("abababc", ["ababc"], "ab"),
        ("stop", ["stop"], ""),
        ("a\n\nb", ["\n\n", "b"], "a"),
        ("one two", ["two", "one"], ""),
        ("xab", ["abc", "xabd"], "xab"),  # beginnings only: all of it comes in the end
        ("überall 😀 ja", ["😀"], "überall "),
        ("", ["a"], ""),
    ],
)
def test_stop_strings_end_the_text_however_it_is_cut(text: str, stop: list[str], expected: str) -> None:
    for size in (1, 2, 3, 100):
        cut = [text[i : i + size] for i in range(0, len(text), size)]
        got = list(until(stop, iter(cut)))
        assert "".join(got) == expected, (size, got)
        assert all(got)
    assert "".join(pieces(text.encode(), stop=stop)) == expected


def test_nothing_of_a_possible_stop_string_is_given_out_early() -> None:
    given: list[str] = []
    for piece in until(["END"], iter(["a", "E", "N", "x", "E", "ND", "never"])):
        given.append(piece)
        assert "".join(given) in ("a", "aENx")
    assert "".join(given) == "aENx"


def test_generation_stops_with_the_stop_string_and_goes_no_further() -> None:
    model = Scripted(b"one two three")
    assert "".join(generate_text(model, BYTES, "x", max_new_tokens=50, temperature=0, stop=[" t"])) == "one"
    assert len(model.asked) == 5
    with pytest.raises(ModelError, match="stop"):
        generate_text(model, BYTES, "x", max_new_tokens=5, stop=[""])


def test_an_empty_prompt_starts_at_the_end_of_text() -> None:
    model = Scripted(b"hi")
    assert list(generate_text(model, BYTES, "", max_new_tokens=5, temperature=0)) == ["h", "i"]
    assert model.asked[0] == [256]

    class Endless(ByteTokenizer):
        eos = None  # type: ignore[assignment]

    with pytest.raises(ModelError, match="prompt: is empty"):
        generate_text(model, Endless(), "", max_new_tokens=5)


def test_text_with_and_without_cache_is_the_same() -> None:
    model = build_model(SMALL, seed=0)
    texts = [
        "".join(generate_text(model, BYTES, "héllo", max_new_tokens=40, seed=3, use_cache=cache))
        for cache in (True, False)
    ]
    assert texts[0] == texts[1] and texts[0]
