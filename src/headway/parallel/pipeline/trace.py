"""Schedules, real or simulated, as a trace that Chrome (chrome://tracing) and Perfetto draw."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class Span(NamedTuple):
    """Something that a rank did, from ``start`` to ``end`` in seconds on a clock that all ranks share."""

    rank: int
    kind: str
    stage: int
    micro: int
    start: float
    end: float


COLOURS = {"forward": "thread_state_running", "backward": "thread_state_iowait", "input": "thread_state_iowait",
           "weight": "thread_state_runnable", "message": "grey"}  # fmt: skip


def chrome_trace(spans: Iterable[Span]) -> dict[str, Any]:
    """The spans in the trace-event format: one row per rank, times from the first span on."""
    listed = sorted(spans, key=lambda span: (span.start, span.rank))
    first = listed[0].start if listed else 0.0
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in sorted({span.rank for span in listed})
    ]
    events += [
        {
            "name": f"{span.kind} {span.micro}",
            "cat": span.kind,
            "ph": "X",
            "pid": 0,
            "tid": span.rank,
            "ts": (span.start - first) * 1e6,
            "dur": (span.end - span.start) * 1e6,
            "cname": COLOURS.get(span.kind, "generic_work"),
            "args": {"stage": span.stage, "micro-batch": span.micro},
        }
        for span in listed
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
