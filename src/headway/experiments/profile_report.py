"""The breakdown of a step that `headway profile` leaves in a run, as the report shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headway.core.errors import HeadwayError
from headway.core.units import human

Node = dict[str, Any]

# Parts below this share of the step are added up in one line: nobody acts on them.
_SMALL = 0.002


def profile_view(path: Path) -> dict[str, Any] | None:
    """What the template draws of a ``profile.json``, or None where there is none.

    Args:
        path: holds a tree of ``name, milliseconds, share, calls, flops_rate, utilization, children``, or a mapping
            with it as ``tree`` and perhaps the table by setting as ``settings``.

    Raises:
        HeadwayError: the file is no such tree.
    """
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        root = data.get("tree", data)
        nodes = [_view(child, 0) for child in root["children"]]
        phases = [
            {"name": n["name"], "share": f"{n['share']:.4f}", "percent": f"{n['share']:.1%}", "color": i}
            for i, n in enumerate(root["children"])
        ]
        settings = [_setting(row) for row in data.get("settings", ())]
        return {"nodes": nodes, "phases": phases, "caption": _caption(data, root), "settings": settings}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HeadwayError(str(path), f"is no breakdown of a step ({type(error).__name__}: {error})",
                           hint="`headway profile` writes one") from None  # fmt: skip


def _view(node: Node, depth: int) -> dict[str, Any]:
    children = [child for child in node.get("children") or [] if child["share"] >= _SMALL]
    small = [child for child in node.get("children") or [] if child["share"] < _SMALL]
    views = [_view(child, depth + 1) for child in children]
    if children and small:
        rest = {
            "name": f"{len(small)} smaller parts" if len(small) > 1 else small[0]["name"],
            "share": sum(child["share"] for child in small),
            "milliseconds": sum(child["milliseconds"] for child in small),
            "calls": sum(child.get("calls") or 0 for child in small),
        }
        views.append(_view(rest, depth + 1))
    rate, used = node.get("flops_rate"), node.get("utilization")
    return {
        "name": node["name"],
        "bar": f"{node['share'] * 80:.1f}",
        "share": f"{node['share']:.1%}",
        "milliseconds": f"{node['milliseconds']:.2f}",
        "calls": f"{node['calls']:g}" if node.get("calls") else "",
        "rate": human(rate) if rate else "",
        "peak": f"{used:.0%}" if used else "",
        "children": views,
        "open": depth == 0 and node["share"] > 0.15,
    }


def _setting(row: Node) -> dict[str, str]:
    """A line of the table by setting; a cell without a result says why."""
    shown = {"name": str(row["setting"]), "batch": str(row["batch"]), "failure": ""}
    if row["status"] != "ok":
        return {**shown, "failure": f"{row['status']}: {row['cause']}"}
    return {
        **shown,
        "milliseconds": f"{row['step_milliseconds']:.1f}",
        "rate": human(row["tokens_per_second"]),
        "peak": f"{row['utilization']:.0%}" if row.get("utilization") else "",
        "memory": human(row["peak_memory_bytes"], "B"),
        "time_ratio": f"{row['time_ratio']:.2f}" if "time_ratio" in row else "",
        "memory_ratio": f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "",
    }


def _caption(data: Node, root: Node) -> str:
    parts = [f"One step takes {root['milliseconds']:.1f} ms while it is watched."]
    if data.get("overhead") is not None:
        parts.append(f"Watching makes it {data['overhead']:+.0%} longer; shares are of the watched time.")
    parts.append("FLOP/s are achieved rates, the last column their share of the measured matrix-product peak.")
    return " ".join(parts)
