"""`headway train`: train a recipe; a directory that already holds a part of the run is resumed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headway.cli.output import JsonFlag, Overrides, note, percent, print_json, print_table
from headway.core.units import human, human_seconds

if TYPE_CHECKING:
    from headway.core.recipe import Recipe
    from headway.core.run import Run

RunOption = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="Run directory.", show_default="runs/NAME-N")
]


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file.")],
    overrides: Overrides = None,
    run: RunOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over where DIR holds a run; asks first.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --fresh: delete the run that DIR holds, unasked.")] = False,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also score gzip and an n-gram model on the validation text.")
    ] = False,
    sample: Annotated[
        str | None, typer.Option("--sample", metavar="PROMPT", help="Also print how the model goes on after PROMPT.")
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", metavar="N", min=1, help="Start N processes on this machine and train on all of them."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Train a recipe. The same RECIPE and DIR again go on where they stopped; Ctrl-C saves first.

    Everything shown is also in DIR/metrics.jsonl and TensorBoard (DIR/tensorboard); the results are in DIR/summary.json
    and DIR/report.html.
    """
    from headway.cli.progress import progress
    from headway.core.errors import Interrupted
    from headway.core.metrics import Observer
    from headway.core.recipe import Recipe
    from headway.core.run import next_run_directory
    from headway.core.train import train as train_run
    from headway.experiments.report import write_report

    loaded = Recipe.load(recipe, overrides or ())
    folder = run or next_run_directory(loaded.name)
    if fresh and not yes:
        _ask_to_delete(folder)
    if ranks is not None:
        options = ["--fresh", "--yes"] * fresh + ["--baselines"] * baselines + ["--json"] * json
        options += ["--sample", sample] if sample is not None else []
        _start_ranks(loaded, ranks, [str(recipe), *(overrides or ()), "--run", str(folder), *options])
        return
    leads = os.environ.get("RANK", "0") == "0"
    if leads:
        note(f"run directory {folder}; preparing data and model")
    observer = progress() if leads else Observer()
    try:
        done = train_run(loaded, run=folder, fresh=fresh, observers=[observer])
    except Interrupted:
        note(f"saved; to go on: headway train {folder}/recipe.yaml --run {folder}")
        raise
    finally:
        observer.close()
    if not leads:
        return
    write_report([done], done.path / "report.html")

    result = {"run": str(done.path), **done.summary}
    if baselines:
        result["baselines"] = _baselines(done)
    if sample is not None:
        result["sample"] = _sample(done, sample)
    print_json(result) if json else _print(result)


def _start_ranks(recipe: Recipe, ranks: int, arguments: list[str]) -> None:
    from headway.core.engine import ranks_here
    from headway.core.errors import RecipeError
    from headway.parallel.legality import check_layout
    from headway.parallel.mesh import settle

    if ranks_here() > 1:
        raise RecipeError("--ranks", f"is given to a process that is one of {ranks_here()} ranks already")
    layout = settle(recipe.parallel, ranks, recipe.train.batch)
    check_layout(recipe, layout)
    from headway.parallel.launch import launch

    note(f"starting {ranks} ranks: {layout}")
    if status := launch(["train", *arguments], ranks):
        raise typer.Exit(status)


def _ask_to_delete(folder: Path) -> None:
    from headway.core.errors import HeadwayError

    if not (folder / "recipe.yaml").is_file():
        return
    if not (sys.stdin.isatty() and typer.confirm(f"Delete the run in {folder} and start over?")):
        raise HeadwayError(
            str(folder), "holds a run, which --fresh would delete", hint="add --yes to delete it unasked"
        )


def _baselines(run: Run) -> dict[str, float]:
    from headway.core.errors import HeadwayError
    from headway.data.options import DataOptions
    from headway.data.pipeline import build_data
    from headway.evals.baselines import gzip_bits_per_byte, ngram_bits_per_byte

    recipe = run.recipe
    if not isinstance(recipe.data, DataOptions):
        raise HeadwayError("--baselines", f"scores text, and workload {recipe.workload} learns none")
    note("scoring gzip and a 5-gram model on the validation text")
    if recipe.eval.batches is not None:
        note("they read all of it; the model was evaluated on a sample of it (eval.batches)")
    data = build_data(recipe.data, recipe.seed)
    trained_on, text = data.text_bytes("train"), data.text_bytes("validation")
    return {"gzip": gzip_bits_per_byte(trained_on, text), "5-gram": ngram_bits_per_byte(trained_on, text, 5)}


def _sample(run: Run, prompt: str) -> str:
    from headway.serve.engine import generate_text
    from headway.workloads.load import load_model

    model, tokenizer = load_model(run.path)
    return prompt + "".join(
        generate_text(model, tokenizer, prompt, max_new_tokens=96, temperature=0.8, top_p=0.95, seed=0)
    )


def _utilization(share: float) -> str:
    if share > 1:  # other work kept the machine from its peak while that was measured
        return "share of the peak unknown: the machine was busy; `headway doctor` measures it anew"
    return f"{percent(share)} of the matrix-product peak"


def _predicted(result: dict[str, Any]) -> str:
    if (memory := result.get("memory")) is None:
        return ""
    return f" (predicted {human(memory['predicted_bytes'], 'B')}, budget {human(memory['budget'], 'B')})"


def _print(result: dict[str, Any]) -> None:
    rows: list[tuple[str, Any]] = [
        ("tokens", f"{human(result['tokens'])} in {result['steps']} steps, {human_seconds(result['wall_seconds'])}"),
        ("rate", f"{human(result['tokens_per_second'])} tokens/s, {_utilization(result['model_flops_utilization'])}"),
        ("memory", f"{human(result['peak_memory_bytes'], 'B')} of tensors{_predicted(result)}, "
                   f"{human(result['process_peak_bytes'], 'B')} of the process"),
        ("validation loss", f"{result['eval_loss']:.4f}"),
    ]  # fmt: skip
    print_table(["", result["run"]], rows)
    if "bits_per_byte" in result:
        scores = [("this model", result["bits_per_byte"]), *result.get("baselines", {}).items()]
        print_table(["", ">validation bits per byte"], [(name, f"{bits:.3f}") for name, bits in scores])
    if "sample" in result:
        print(result["sample"])
