"""Generation: tokens one at a time from any model that offers ``hidden`` or ``forward``, and text from those."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.core.errors import ModelError
from headway.core.fallback import fallback
from headway.serve.cache import Cache

LongPrompt = Literal["refuse", "truncate"]


class Tokenizer(Protocol):
    """What text generation needs of a tokenizer."""

    @property
    def eos(self) -> int | None:
        """The token that ends a text."""

    @property
    def vocab(self) -> int:
        """How many tokens there are."""

    def encode(self, text: str) -> list[int]:
        """Text to tokens."""

    def decode(self, tokens: list[int]) -> str:
        """Tokens to text; bytes that are no UTF-8 become U+FFFD."""


def generate(
    model: Any,
    tokens: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    stop_tokens: Collection[int] = (),
    seed: int | None = None,
    use_cache: bool = True,
    long_prompt: LongPrompt = "refuse",
) -> Iterator[int]:
    """Continue a prompt, token by token; the end is a stop token, ``max_new_tokens`` or the model's context.

    Args:
        model: ours or a TransformersModel.
        tokens: the prompt, at least one.
        max_new_tokens: most tokens to generate.
        temperature: divides the logits; 0 takes the most likely token always.
        top_p: sample among the most likely tokens whose probabilities reach this sum.
        top_k: sample among this many most likely tokens; applied before ``top_p``.
        stop_tokens: these end the text and are not given out.
        seed: of the sampling; by default drawn from torch's global generator.
        use_cache: keep keys and values; without it every token costs a pass over the whole text.
        long_prompt: ``truncate`` drops the beginning of a prompt that leaves no room in the context, and says so.

    Returns:
        An iterator over token numbers; arguments are checked before it is made.

    Raises:
        ModelError: the prompt is empty, too long or not of the vocabulary, an argument is out of range, or (while
            iterating) the logits are not finite.
    """
    _check("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0")
    _check("temperature", temperature, 0 <= temperature < float("inf"), "a number from 0 up")
    _check("top_p", top_p, 0 < top_p <= 1, "a share above 0 and up to 1")
    _check("top_k", top_k, top_k is None or top_k >= 1, "at least 1")
    prompt = _fit([int(token) for token in tokens], model, long_prompt)
    room = max_new_tokens if model.context is None else min(max_new_tokens, model.context - len(prompt))
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)

    def choose(logits: Tensor) -> int:
        return sample(logits, temperature, top_p, top_k, generator)

    return _steps(model, prompt, room, choose, frozenset(stop_tokens), use_cache)


def generate_text(
    model: Any,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    stop: Sequence[str] = (),
    seed: int | None = None,
    use_cache: bool = True,
    long_prompt: LongPrompt = "refuse",
) -> Iterator[str]:
    """Continue a text, piece by piece; the pieces joined are the continuation.

    A piece never ends within a character, nor in what may become a stop string. Generation ends at the tokenizer's end
    of text or before the first stop string, which is not given out.

    Args:
        prompt: may be empty if the tokenizer has an end-of-text token, which then opens the text.
        stop: strings that end the text.

    Other arguments, and errors, are those of ``generate``.
    """
    _check("stop", list(stop), all(stop), "strings that are not empty")
    start = tokenizer.encode(prompt)
    if not start and tokenizer.eos is not None:
        start = [tokenizer.eos]
    tokens = generate(
        model,
        start,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop_tokens=() if tokenizer.eos is None else (tokenizer.eos,),
        seed=seed,
        use_cache=use_cache,
        long_prompt=long_prompt,
    )
    return until(stop, text_of(tokenizer, tokens, start))


def sample(
    logits: Tensor, temperature: float, top_p: float, top_k: int | None, generator: torch.Generator | None = None
) -> int:
    """One token from logits [V].

    Raises:
        ModelError: the logits are not finite.
    """
    logits = logits.float().cpu()  # the same numbers, and so the same choice, wherever the model runs
    if not torch.isfinite(logits).all():
        raise ModelError("generation", "the model's logits are not finite", hint="its training may have diverged")
    if temperature == 0:
        return int(logits.argmax())
    order = None
    if top_k is not None:
        logits, order = logits.topk(min(top_k, len(logits)))
    elif top_p < 1:  # a sort takes longer than all the rest: only where it is needed
        logits, order = logits.sort(descending=True)
    # The largest logit is taken off before the division: a tiny temperature would overflow otherwise.
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # a token stays if those above it do not suffice
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    index = torch.multinomial(probabilities, 1, generator=generator)
    return int(index if order is None else order[index])


def text_of(tokenizer: Tokenizer, tokens: Iterator[int], prompt: Sequence[int] = ()) -> Iterator[str]:
    """Decode a stream of tokens, holding back a character whose bytes are not all there.

    Only the last few tokens are decoded each time, together with the one before them, because tokenizers may treat the
    first token of a text in their own way.
    """
    window = list(prompt[-1:])
    given = len(tokenizer.decode(window))
    for token in tokens:
        window.append(token)
        text = tokenizer.decode(window)
        whole = text.removesuffix("\ufffd")  # an unfinished character decodes to exactly one of these, at the end
        if len(whole) > given:
            yield whole[given:]
            given = len(whole)
        if whole == text:
            window = window[-1:]
            given = len(tokenizer.decode(window))
    rest = tokenizer.decode(window)[given:]
    if rest:
        yield rest


def until(stop: Sequence[str], pieces: Iterator[str]) -> Iterator[str]:
    """Pass on the pieces up to the first of the strings ``stop``, holding back what may be the beginning of one."""
    held = ""
    for piece in pieces:
        held += piece
        ends = [at for text in stop if (at := held.find(text)) >= 0]
        if ends:
            if min(ends):
                yield held[: min(ends)]
            return
        keep = max((_overlap(held, text) for text in stop), default=0)
        ready, held = held[: len(held) - keep], held[len(held) - keep :]
        if ready:
            yield ready
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0)


def _steps(
    model: Any, prompt: list[int], room: int, choose: Any, stop_tokens: frozenset[int], use_cache: bool
) -> Iterator[int]:
    if room == 0:
        return
    device = next(model.parameters()).device
    cache = _new_cache(model, len(prompt) + room) if use_cache else None
    text = list(prompt)
    new = text
    training = model.training
    model.eval()
    try:
        for _ in range(room):
            with torch.no_grad():  # not inference mode: some models of transformers keep tensors of theirs
                logits = _last_logits(model, torch.tensor([text if cache is None else new], device=device), cache)
                token = choose(logits)
            if token in stop_tokens:
                return
            yield token
            new = [token]
            text.append(token)
    finally:
        model.train(training)


def _last_logits(model: Any, tokens: Tensor, cache: Cache | None) -> Tensor:
    """Logits [V] after the last of ``tokens`` [1, T]; where the head allows, only of that one."""
    if model.plain_head:
        product = getattr(model, "head_logits", F.linear)
        return product(model.hidden(tokens, cache=cache)[0, -1], model.head_weight)
    return model(tokens, cache=cache)[0, -1]


def _new_cache(model: Any, length: int) -> Cache | None:
    try:
        cache: Cache = model.new_cache(1, length)
    except ModelError as reason:
        fallback("generation without a cache", str(reason), "a pass over the whole text for every token")
        return None
    return cache


def _fit(prompt: list[int], model: Any, long_prompt: LongPrompt) -> list[int]:
    if not prompt:
        raise ModelError("prompt", "is empty", expected="at least one token")
    outside = next((token for token in prompt if not 0 <= token < model.vocab), None)
    if outside is not None:
        raise ModelError(
            "prompt", "has a token outside the model's vocabulary", got=outside, expected=f"numbers below {model.vocab}"
        )
    if model.context is None or len(prompt) < model.context:
        return prompt
    if long_prompt == "refuse":
        raise ModelError(
            "prompt",
            f"has {len(prompt)} tokens, which leaves no room in the model's context of {model.context}",
            hint="shorten it, or let its beginning be dropped with long_prompt='truncate'",
        )
    keep = max(1, model.context // 2)
    fallback(
        f"the last {keep} tokens of the prompt",
        f"its {len(prompt)} tokens leave no room in the context of {model.context}",
        "what the beginning says",
    )
    return prompt[-keep:]


def _check(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise ModelError(name, got=value, expected=expected)
