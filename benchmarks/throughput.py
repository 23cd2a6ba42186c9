"""Tokens per second of Headway and of transformers.Trainer on the same text, in turns, on this machine.

    python benchmarks/throughput.py                 # both shapes, about fifteen minutes on two cores
    python benchmarks/throughput.py --shape small   # 256 x 6 only
    python benchmarks/throughput.py --write         # also writes evidence/throughput.json
    python benchmarks/throughput.py --profile       # where Headway's step goes: the table of operations

Each arm is a real training in a process of its own, because allocator settings and compiled code belong to the process.
An arm waits on its standard input, trains one block of steps when told to, and answers with the seconds; so one arm
runs at a time, and all of them see the same state of the machine within a round. Headway's trainer is assembled
from a recipe, as `headway train` does it. The other side is transformers.Trainer's own loop with logging, evaluation
and saving off, fused AdamW, and the best of fp32, bf16 by autocast, and bf16 with torch.compile. Between rounds the
matrix-product peak of the machine is measured, in Headway's process.

Needs the development dependencies (transformers, accelerate). Run it on an idle machine: a second process on one of
two cores costs far more than half of the speed, since every parallel operation waits for the slower core.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import arms

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Shape:
    """A model and how long it is measured."""

    name: str
    hidden: int
    layers: int
    steps: int  # in a block


SHAPES = {"small": Shape("small", 256, 6, 4), "large": Shape("large", 512, 12, 1)}


class Worker:
    """An arm's process."""

    def __init__(self, arm: str, shape: Shape, threads: int | None) -> None:
        self.arm = arm
        command = [sys.executable, str(ROOT / "benchmarks/arms.py"), arm, str(shape.hidden), str(shape.layers)]
        environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        self.seconds: list[float] = []  # per step, one for each block

    def ask(self, line: str) -> list[str]:
        """Send a line; the words of the answer."""
        assert self.process.stdin and self.process.stdout
        if line:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        while answer := self.process.stdout.readline():
            if answer.startswith(arms.MARK):
                return answer.split()[1:]
        self.errors.seek(0)
        raise SystemExit(f"{self.arm} died:\n{self.errors.read()[-2000:]}")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def measure(shape: Shape, names: list[str], rounds: int, threads: int | None) -> dict[str, Any]:
    """Let the arms take turns: seconds per step of each, FLOPs per token, and the peaks between rounds."""
    workers = []
    for name in names:
        print(f"  starting {name}", flush=True)
        workers.append(Worker(name, shape, threads))
        workers[-1].ask("")  # one arm at a time: compiling is not to compete with compiling
    headway = next(worker for worker in workers if worker.arm.startswith("headway"))
    flops = float(headway.ask("flops")[0])
    peaks = []
    for index in range(rounds + 1):
        peaks.append(float(headway.ask("peak")[0]))
        for worker in workers if index % 2 else workers[::-1]:
            seconds = float(worker.ask(f"steps {shape.steps}")[0]) / shape.steps
            if index:  # the first round warms up
                worker.seconds.append(seconds)
        print(f"  round {index} of {rounds}", end="\r", flush=True)
    for worker in workers:
        worker.close()
    return {"seconds": {worker.arm: worker.seconds for worker in workers}, "flops": flops, "peak": median(peaks)}


def report(shape: Shape, measured: dict[str, Any]) -> dict[str, Any]:
    """Print the table of a shape; its best arms and their ratio."""
    from headway.experiments.statistics import bootstrap, paired_ratio

    seconds, tokens = measured["seconds"], arms.BATCH * arms.SEQUENCE
    best = {
        side: min((arm for arm in seconds if arm.startswith(side)), key=lambda arm: median(seconds[arm]))
        for side in ("headway", "transformers")
    }
    print(f"\n{shape.name}: hidden {shape.hidden}, {shape.layers} layers, vocabulary {arms.VOCAB}, "
          f"sequence {arms.SEQUENCE}, batch {arms.BATCH}; bf16 matrix products peak at "
          f"{measured['peak'] / 1e9:.0f} GFLOP/s")  # fmt: skip
    print(f"  {'arm':28}{'tokens/s':>9}  {'[90 % interval]':18}{'of best transformers':>24}{'of peak':>9}")
    rates, ratios, shares = {}, {}, {}
    for arm, times in seconds.items():
        rates[arm] = bootstrap([tokens / s for s in times])
        ratios[arm] = paired_ratio(seconds[best["transformers"]], times)
        shares[arm] = bootstrap([tokens / s * measured["flops"] / measured["peak"] for s in times])
        interval = f"[{rates[arm].low:.0f}, {rates[arm].high:.0f}]"
        print(f"  {arm:28}{rates[arm].value:9.0f}  {interval:18}{ratios[arm]!s:>24}{shares[arm].value:9.1%}")
    return {"best": best, "rates": rates, "ratio": ratios[best["headway"]], "share": shares[best["headway"]]}


def evidence(results: dict[str, dict[str, Any]], minutes: float) -> Any:
    """The results in the format of `evidence/`."""
    import accelerate
    import transformers

    from headway.experiments.base import at_least
    from headway.experiments.evidence import Outcome, Row, Value, provenance

    def row(shape: str, measure: str, title: str, estimate: Any, goal: float, least: float) -> Row:
        return Row(measure=f"{shape}_{measure}", title=title, claimed=f"goal {goal:g}", measured=estimate.value,
                   interval=estimate.interval, expected=f"at least {least:g}", bound=at_least(least).to_dict(),
                   held=estimate.value >= least)  # fmt: skip

    rows, values = [], {}
    if small := results.get("small"):
        rows.append(row("small", "ratio", "Tokens per second of transformers.Trainer at its best, hidden 256, 6 layers",
                        small["ratio"], 2.0, 1.5))  # fmt: skip
    if large := results.get("large"):
        rows.append(row("large", "share", "Share of the bf16 matrix-product peak, hidden 512, 12 layers",
                        large["share"], 0.6, 0.4))  # fmt: skip
    for shape, result in results.items():
        values[f"{shape}_peak"] = Value(value=result["peak"], unit="FLOP/s")
        values[f"{shape}_ratio"] = Value(value=result["ratio"].value, interval=result["ratio"].interval)
        values[f"{shape}_share"] = Value(value=result["share"].value, interval=result["share"].interval)
        for arm, rate in result["rates"].items():
            values[f"{shape}_{arm}"] = Value(value=rate.value, interval=rate.interval, unit="tokens/s")
    made = provenance()
    made["versions"] |= {"transformers": transformers.__version__, "accelerate": accelerate.__version__}
    return Outcome(
        name="throughput",
        title="Tokens per second beside transformers.Trainer",
        paper="",
        claim="At least 1.5 times the tokens per second of transformers.Trainer at its best setting (hidden 256, "
        "6 layers), and at least 40 % of the bf16 matrix-product peak (hidden 512, 12 layers).",
        held=bool(rows) and all(row.held for row in rows),
        quick=len(results) < len(SHAPES),
        rows=rows,
        measurements=values,
        arms={arm: [] for arm in arms.ARMS},
        recipe=arms.recipe("bf16", 256, 6),
        seeds=[0],
        notes="Made by benchmarks/throughput.py --write.",
        minutes=minutes,
        **made,
    )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="only this one; may be repeated")
    parser.add_argument("--arms", nargs="+", choices=arms.ARMS, default=list(arms.ARMS), metavar="ARM",
                        help=f"of: {', '.join(arms.ARMS)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=8, help="blocks of each arm that count")
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--write", action="store_true", help="write evidence/throughput.json")
    parser.add_argument("--profile", action="store_true", help="show where Headway's step goes instead")
    options = parser.parse_args()
    shapes = [SHAPES[name] for name in options.shape or SHAPES]
    if options.profile:
        for shape in shapes:
            arms.profile(next(a for a in options.arms if a.startswith("headway")), shape.hidden, shape.layers)
        return 0
    for side in ("headway", "transformers"):
        if not any(arm.startswith(side) for arm in options.arms):
            parser.error(f"--arms needs one of {side}")
    if options.write and (options.shape or options.arms != list(arms.ARMS)):
        parser.error("--write needs all shapes and arms")
    started, results = time.perf_counter(), {}
    for shape in shapes:
        print(f"{shape.name}:", flush=True)
        measured = measure(shape, options.arms, options.rounds, options.threads)
        results[shape.name] = {**measured, **report(shape, measured)}
    outcome = evidence(results, (time.perf_counter() - started) / 60)
    if options.write:
        from headway.experiments.evidence import save_evidence

        print("wrote", save_evidence(outcome, ROOT / "evidence/throughput.json"))
    for row in outcome.rows:
        print(f"{'held' if row.held else 'NOT held'}: {row.title}: {row.measured:.2f}, {row.expected} ({row.claimed})")
    return outcome.exit_status


if __name__ == "__main__":
    sys.exit(main())
