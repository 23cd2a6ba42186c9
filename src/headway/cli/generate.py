"""`headway generate`: see how a trained model goes on after a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory or Hugging Face folder.")],
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What the text begins with.")],
    tokens: Annotated[int, typer.Option(min=1, help="At most this many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this mass.")] = 0.95,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from this many likeliest tokens.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the draw repeatable.")] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Compute every position anew: slow, for checking.")
    ] = False,
) -> None:
    """Print the model's continuation of a prompt as it is made."""
    import torch

    from headway.serve.engine import generate_text
    from headway.workloads.load import load_model

    model, tokenizer = load_model(run, device="cuda" if torch.cuda.is_available() else "cpu")
    print(prompt, end="", flush=True)
    for piece in generate_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop or (),
        seed=seed,
        use_cache=not no_cache,
    ):
        print(piece, end="", flush=True)
    print()
