"""Profiles as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from headway.core.units import human

if TYPE_CHECKING:
    from headway.plan.dissect.profile import Setting

Tree = dict[str, Any]

_PARTS = ("parameters", "gradients", "optimizer", "activations", "other")


def settings_table(settings: Sequence[Setting]) -> Table:
    """A row per setting and batch: time, rate, memory, ratios to the first setting, and the share of each phase."""
    phases = list(dict.fromkeys(name for setting in settings for name in setting.phases))
    rows: list[tuple[str, ...]] = []
    for setting in settings:
        cell = setting.cell
        if cell.status != "ok":
            rows.append((setting.name, str(setting.batch), f"{cell.status}: {cell.cause}"))
            continue
        peak = cell.metric("peak_memory_bytes")
        rows.append((
            setting.name,
            str(setting.batch),
            f"{cell.mean_seconds * 1e3:.1f} ± {cell.spread_seconds * 1e3:.1f}",
            _ratio(setting.time_ratio),
            human(cell.tokens_per_second),
            _rate(cell.flops_rate, cell.utilization, cell.precision),
            human(peak, "B") if peak else "",
            _ratio(setting.memory_ratio),
            human(cell.metric("process_peak_bytes") or 0, "B"),
            *(_percent(setting.phases.get(name)) for name in phases),
        ))  # fmt: skip
    columns = ["setting", ">batch", ">ms a step", ">time ratio", ">tokens/s", ">model FLOP/s", ">live peak",
               ">memory ratio", ">process", *(f">{name}" for name in phases)]  # fmt: skip
    return _table("settings", columns, rows)


def breakdown_table(tree: Tree, depth: int, least: float) -> Table:
    """Phases and modules, and the operations inside as far as ``depth`` allows."""
    columns = ["where the time goes", ">ms", ">share", ">calls", ">FLOP/s", ">of peak", ">bytes/s"]
    caption = f"watched, a step takes {tree['step_milliseconds']:.1f} ms, {tree['overhead']:+.0%} against unwatched"
    return _table(caption, columns, list(_rows(tree["tree"], 0, depth, least)))


def _rows(node: Tree, level: int, depth: int, least: float) -> Iterable[tuple[str, ...]]:
    yield (
        "  " * level + node["name"],
        f"{node['milliseconds']:.1f}",
        _percent(node["share"]),
        f"{node['calls']:.4g}" if node["calls"] else "",
        human(node["flops_rate"]) if node["flops_rate"] else "",
        _percent(node["utilization"]),
        human(node["bytes_rate"], "B") if node["bytes_rate"] else "",
    )
    if level < depth:
        for child in node["children"]:
            if child["share"] >= least:
                yield from _rows(child, level + 1, depth, least)


def operations_table(tree: Tree, least: float) -> Table:
    """Operations summed over phases and modules, the longest first."""
    total: dict[str, dict[str, float]] = {}
    for leaf in _leaves(tree["tree"]):
        sums = total.setdefault(leaf["name"], dict.fromkeys(("milliseconds", "share", "calls", "flops", "bytes"), 0.0))
        for key in sums:
            sums[key] += leaf[key]
    rows = [
        (
            name,
            f"{sums['milliseconds']:.1f}",
            _percent(sums["share"]),
            f"{sums['calls']:.4g}" if sums["calls"] else "",
            human(sums["flops"] / sums["milliseconds"] * 1e3) if sums["flops"] else "",
            human(sums["bytes"] / sums["milliseconds"] * 1e3, "B") if sums["bytes"] else "",
        )
        for name, sums in sorted(total.items(), key=lambda item: -item[1]["milliseconds"])
        if sums["share"] >= least
    ]
    return _table("operations", ["operation", ">ms", ">share", ">calls", ">FLOP/s", ">bytes/s"], rows)


def _leaves(node: Tree) -> Iterable[Tree]:
    if not node["children"]:
        yield node
    for child in node["children"]:
        yield from _leaves(child)


def memory_table(memory: dict[str, Any]) -> Table:
    """Tensors by purpose, before a step and at its peak."""
    rows = [(part, human(memory["before"][part], "B"), human(memory["peak"][part], "B")) for part in _PARTS]
    rows.append(("sum", human(memory["before_bytes"], "B"), human(memory["peak_bytes"], "B")))
    title = f"memory of tensors; the process holds {human(memory['process_bytes'], 'B')} at most"
    if memory["reserved_bytes"]:
        title += f", the GPU's allocator {human(memory['reserved_bytes'], 'B')}"
    return _table(title, ["", ">between steps", f">at the peak, in {memory['peak_phase']}"], rows)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row[: len(columns)]))
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _rate(rate: float, utilization: float | None, precision: dict[str, float] | None) -> str:
    if utilization is None or not precision:
        return human(rate)
    return f"{human(rate)} ({utilization:.0%} of {'/'.join(precision)})"
