"""Which mapping of a mixture-of-experts model onto a cluster is fastest: two grids of ranks, simulated and ranked.

A step is counted as operations at a share of the peak, and as messages of alpha + bytes / beta over the fast links in
a node or the slow ones between nodes: what one rank does, all ranks being alike and experts evenly loaded. Source of
the families of mappings: arXiv 2504.14960, table 2 and section 4.

Shapes: S tokens of a sequence, D channels, F channels inside an expert, E experts, k choices per token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from headway.core.errors import HeadwayError
from headway.parallel.experts.grids import Grids, fold, mappings, unfolded
from headway.plan.cluster.hardware import Cluster, Device, Link, Reach

Family = Literal["fsdp", "fsdp+ep", "tp+ep+dp", "5-d", "folded"]
FAMILIES: tuple[Family, ...] = ("fsdp", "fsdp+ep", "tp+ep+dp", "5-d", "folded")
"""Weights gathered as they are used; that with expert ranks; tensor, expert and data ranks; those with sequence and
pipeline ranks, expert ranks being data ranks; the same with the experts' grid folded."""

HALF = 256
"""A matrix product with one dimension of so many reaches half of what one of large dimensions does; assumed."""
RESERVED = 6e9
"""Bytes of a device that libraries, buffers and fragmentation take."""


@dataclass(frozen=True)
class ExpertModel:
    """The sizes of a mixture-of-experts decoder."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    width: int
    """Channels inside an expert."""
    experts: int
    top_k: int
    vocab: int
    shared: int = 0
    """Channels of a network that every token visits besides."""

    @classmethod
    def of(cls, config: Any, name: str = "model") -> ExpertModel:
        """From the configuration of a model of the moe family; its dense first blocks count as blocks of experts."""
        return cls(name, config.layers, config.hidden, config.heads, config.kv_head_count, config.head_width,
                   config.expert_channels, config.experts, config.top_k, config.vocabulary,
                   config.shared_experts * config.expert_channels)  # fmt: skip

    @property
    def dense(self) -> int:
        """Weights of a block outside of its experts."""
        attention = self.hidden * self.head_width * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.shared + self.hidden * self.experts

    @property
    def routed(self) -> int:
        """Weights of a block's experts."""
        return 3 * self.hidden * self.width * self.experts

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.layers * (self.dense + self.routed) + 2 * self.vocab * self.hidden

    def flops(self, tokens: float, sequence: int) -> float:
        """Floating-point operations of a forward and backward pass; the masked half of attention counts."""
        block = self.dense + self.routed * self.top_k / self.experts
        scores = 2 * self.heads * self.head_width * sequence
        return 6 * tokens * (self.layers * (block + scores) + self.vocab * self.hidden)


MIXTRAL = ExpertModel("Mixtral-8x22B", 56, 6144, 48, 8, 128, 16384, 8, 2, 32768)
G8T8 = ExpertModel("Mixtral-8x22B-G8T8", 56, 6144, 48, 8, 128, 2048, 64, 8, 32768)
QWEN2 = ExpertModel("Qwen2-57B-A14B", 28, 3584, 28, 4, 128, 2560, 64, 8, 151936, shared=20480)
LLAMA3 = ExpertModel("Llama3-8x70B", 80, 8192, 64, 8, 128, 28672, 8, 2, 128256)

PRINTED: dict[str, tuple[int, tuple[float | None, ...]]] = {
    "Mixtral-8x22B": (128, (4.3, 23.4, 36.6, 46.3, 49.3)),
    "Llama3-8x70B": (256, (None, 19.6, None, 38.8, 41.6)),
    "Qwen2-57B-A14B": (64, (9.9, 25.4, 23.1, 35.3, 39.0)),
    "Mixtral-8x22B-G8T8": (128, (2.2, 9.0, 8.7, 17.1, 28.8)),
}
"""GPUs, and per cent of the peak by family, out of memory where None: arXiv 2504.14960, table 1 (H100, bf16, 256
sequences of 4096 tokens, capacity factor 1)."""


def published(devices: int) -> Cluster:
    """H100s in nodes of eight with the links' rates on paper: NVLink 450 GB/s, InfiniBand 50 GB/s per device."""
    return Cluster(
        name="h100",
        device=Device(peak={"bf16": 989e12}, memory=80 * 10**9, memory_bandwidth=3.35e12, launch=5e-6),
        reach=Reach(most=0.7),
        node=8,
        inside=Link(kind="nvlink", bandwidth=450e9, latency=5e-6),
        between=Link(kind="infiniband", bandwidth=50e9, latency=1e-5),
        devices=devices,
    )


@dataclass(frozen=True)
class Mapping:
    """One way of spreading the model: two grids, and how the weights are kept."""

    grids: Grids
    gathered: bool
    """Weights, gradients and optimizer state are divided over all data ranks and gathered as they are used (FSDP);
    else only the optimizer state is divided."""
    chunks: int = 1
    """Stages per pipeline rank."""
    recompute: bool = False
    """Each block's forward pass is done again."""

    def __str__(self) -> str:
        s = self.grids.sizes()
        short = {"pipeline": "pp", "data": "dp", "sequence": "cp", "tensor": "tp"}
        names = {"expert_data": "edp", "expert": "ep", "expert_tensor": "etp"}
        attention, experts = (" ".join(f"{v}{s[k]}" for k, v in d.items() if s[k] > 1) for d in (short, names))
        extras = "".join(
            [f", {self.chunks} chunks" if self.chunks > 1 else "", ", recompute" if self.recompute else ""]
        )
        return f"{attention or '-'} | {experts or '-'}{extras}"


@dataclass(frozen=True)
class Predicted:
    """What a mapping is predicted to take."""

    family: Family
    mapping: Mapping
    seconds: float
    """Of a step."""
    memory: float
    """Bytes of the fullest rank."""
    utilization: float
    """Share of the devices' peak."""
    parts: dict[str, float]
    """Seconds by kind: `compute`, `tensor`, `sequence`, `expert`, `expert_tensor`, `weights`, `bubble`."""


def plan_moe_mapping(
    model: ExpertModel,
    cluster: Cluster,
    seq_len: int,
    *,
    batch: int = 256,
    families: tuple[Family, ...] = FAMILIES,
    recompute: bool = True,
) -> list[Predicted]:
    """All mappings that fit into memory, the fastest first.

    Args:
        cluster: its ``devices`` are the ranks.
        seq_len: tokens of a sequence.
        batch: sequences in a step, run one at a time on each data rank.
        recompute: also try to recompute blocks; where weights are gathered that is always tried.

    Raises:
        HeadwayError: none fits.
    """
    found, least = [], float("inf")
    for family in families:
        for mapping in candidates(family, model, cluster.devices, batch, seq_len):
            if mapping.recompute and not (recompute or mapping.gathered):
                continue
            predicted = _Step(model, cluster, mapping, batch, seq_len).predict(family)
            least = min(least, predicted.memory)
            if predicted.memory <= cluster.device.memory:
                found.append(predicted)
    if not found:
        raise HeadwayError(f"{model.name} on {cluster.devices} devices", f"needs {least / 1e9:.0f} GB each at the "
                           f"least, and they have {cluster.device.memory / 1e9:.0f}",
                           hint="take more devices")  # fmt: skip
    return sorted(found, key=lambda p: p.seconds)


def best_of_each(ranked: list[Predicted]) -> dict[Family, Predicted | None]:
    """The fastest of every family; None where none fits."""
    return {family: next((p for p in ranked if p.family == family), None) for family in FAMILIES}


def candidates(family: Family, model: ExpertModel, world: int, batch: int, sequence: int) -> Iterator[Mapping]:
    """The mappings of one family, each with recomputed blocks and without."""
    for grids, chunks in _grids(family, model, world):
        size = grids.sizes()
        divides = batch % size["data"] == 0 and model.kv_heads % size["tensor"] == 0
        if divides and sequence % (2 * size["sequence"] * size["tensor"]) == 0:
            for recompute in (False, True):
                yield Mapping(grids, family.startswith("fsdp"), chunks, recompute)


def _grids(family: Family, model: ExpertModel, world: int) -> Iterator[tuple[Grids, int]]:
    if family == "fsdp":
        yield fold(world), 1
    elif family == "fsdp+ep":
        for expert in _powers(min(model.experts, world)):
            if world % expert == 0 and expert > 1:
                yield fold(world, expert=expert), 1
    elif family == "folded":
        for pipeline in _powers(world):
            for chunks in _chunks(model, pipeline):
                for grids in mappings(world, pipeline=pipeline, experts=model.experts, width=model.width):
                    s = grids.sizes()
                    if max(s["tensor"], s["expert_tensor"], s["sequence"]) <= 8:
                        yield grids, chunks
    else:
        stages = _powers(world) if family == "5-d" else [1]
        sequences = _powers(8) if family == "5-d" else [1]
        for pipeline, sequence, tensor in itertools.product(stages, sequences, _powers(8)):
            data, left = divmod(world, pipeline * sequence * tensor)
            if left or not data:
                continue
            for expert, chunks in itertools.product(_powers(min(data, model.experts)), _chunks(model, pipeline)):
                if data % expert == 0:
                    yield unfolded(world, pipeline=pipeline, sequence=sequence, tensor=tensor, expert=expert), chunks


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _chunks(model: ExpertModel, pipeline: int) -> list[int]:
    if pipeline == 1:
        return [1]
    if pipeline > model.layers or model.layers % pipeline:
        return []
    per = model.layers // pipeline
    return [c for c in range(1, per + 1) if per % c == 0 and c <= 8]


class _Step:
    """One step under one mapping, as one rank sees it."""

    def __init__(self, model: ExpertModel, cluster: Cluster, mapping: Mapping, batch: int, sequence: int) -> None:
        self.model, self.cluster, self.mapping = model, cluster, mapping
        self.size = mapping.grids.sizes()
        self.batch, self.sequence = batch, sequence
        self.micros = batch // self.size["data"]
        self.tokens = sequence / (self.size["sequence"] * self.size["tensor"])  # n: of a rank, between the layers
        self.layers = model.layers / self.size["pipeline"]
        self.peak = cluster.peak("bf16")

    def predict(self, family: Family) -> Predicted:
        """Seconds and bytes."""
        forward, passes = self._forward_compute(), 4 if self.mapping.recompute else 3
        # Messages of the forward pass, again in the backward pass, and once more where it is repeated.
        messages = {kind: seconds * (passes - 1) for kind, seconds in self._messages().items()}
        layer = forward * passes + sum(messages.values())
        micro = self.layers * layer + self._head()
        weights = self._weights(micro)
        stages = self.size["pipeline"]
        bubble = (stages - 1) / self.mapping.chunks * micro
        boundary = 4 * self.mapping.chunks * self._send(self.tokens * self.model.hidden * 2) if stages > 1 else 0.0
        seconds = self.micros * (micro + boundary) + bubble + weights
        parts = {kind: self.micros * self.layers * value for kind, value in messages.items()}
        parts |= {"compute": self.micros * (self.layers * forward * passes + self._head()), "weights": weights,
                  "bubble": bubble, "pipeline": self.micros * boundary}  # fmt: skip
        flops = self.model.flops(self.batch * self.sequence, self.sequence)
        return Predicted(family, self.mapping, seconds, self._memory(),
                         flops / seconds / self.peak / self.cluster.devices, parts)  # fmt: skip

    def _product(self, rows: float, inner: float, outer: float, times: float = 1) -> float:
        """Seconds of ``times`` products [rows, inner] x [inner, outer]."""
        reach = self.cluster.reach.most
        for dimension in (rows, inner, outer):
            reach *= dimension / (dimension + HALF)
        moved = 2 * (rows * inner + inner * outer + rows * outer)
        work = 2 * rows * inner * outer / (self.peak * max(reach, 1e-9))
        return times * (max(work, moved / self.cluster.device.memory_bandwidth) + self.cluster.device.launch)

    def _forward_compute(self) -> float:
        """Seconds of one block's forward pass of one micro-batch."""
        m, s = self.model, self.size
        t, rows = s["tensor"], self.sequence / s["sequence"]
        heads, kv, hd = m.heads / t, max(m.kv_heads / t, 1), m.head_width
        seconds = self._product(rows, m.hidden, (heads + 2 * kv) * hd) + self._product(rows, heads * hd, m.hidden)
        # Fused attention does half of the scores, at about the efficiency of narrow products.
        seconds += 2 * rows * self.sequence * heads * hd / (0.5 * self.peak)
        if m.shared:
            seconds += self._product(rows, m.hidden, 2 * m.shared / t) + self._product(rows, m.shared / t, m.hidden)
        here, et = m.experts / s["expert"], s["expert_tensor"]
        routed = self.tokens * m.top_k * et / here  # rows of one expert: what its expert and tensor ranks send
        seconds += self._product(routed, m.hidden, 2 * m.width / et, here)
        seconds += self._product(routed, m.width / et, m.hidden, here)
        # What only moves: norms and residuals; routed rows permuted, activated, brought back.
        moved = self.tokens * m.hidden * 12 + self.tokens * m.top_k * et * (4 * m.hidden + 4 * m.width / et)
        return seconds + 2 * moved / self.cluster.device.memory_bandwidth

    def _head(self) -> float:
        """Seconds of embedding and head, forward and backward, spread over the pipeline."""
        rows, t = self.sequence / self.size["sequence"], self.size["tensor"]
        return 3 * self._product(rows, self.model.hidden, self.model.vocab / t) / self.size["pipeline"]

    def _messages(self) -> dict[str, float]:
        """Seconds of one block's messages in the forward pass of one micro-batch."""
        m, s, row = self.model, self.size, self.model.hidden * 2
        local, t, et = self.tokens * row, s["tensor"], s["expert_tensor"]
        kv = 2 * self.sequence / s["sequence"] * max(m.kv_heads / t, 1) * m.head_width * 2
        regions = 2 if m.shared else 1  # attention; the shared network is divided by tensor ranks as well
        routed = local * m.top_k
        return {
            "tensor": 2 * regions * self._collective("tensor", local * (t - 1)),
            "sequence": self._collective("sequence", kv * (s["sequence"] - 1)),
            "expert": 2 * self._exchange("expert", routed),
            "expert_tensor": 2 * self._collective("expert_tensor", routed * (et - 1)),
        }

    def _collective(self, name: str, nbytes: float) -> float:
        """Seconds of a gather or its mirror in which every rank receives ``nbytes``; the slowest link sets the pace."""
        group = self.mapping.grids.groups(name)[0]
        if len(group) == 1:
            return 0.0
        link = self.cluster.inside if self._inside(group) else self.cluster.between
        return (len(group) - 1) * link.latency + nbytes / link.bandwidth

    def _exchange(self, name: str, nbytes: float) -> float:
        """Seconds of an all-to-all of ``nbytes`` per rank: links inside and between nodes work at the same time."""
        group, node = self.mapping.grids.groups(name)[0], self.cluster.node
        if len(group) == 1:
            return 0.0
        near = sum(rank // node == group[0] // node for rank in group)
        inside, between = self.cluster.inside, self.cluster.between
        share = nbytes / len(group)
        seconds = (near - 1) * (share / inside.bandwidth + inside.latency)
        return max(seconds, (len(group) - near) * (share / between.bandwidth + between.latency))

    def _send(self, nbytes: float) -> float:
        return self.cluster.between.latency + nbytes / self.cluster.between.bandwidth

    def _inside(self, group: list[int]) -> bool:
        return len({rank // self.cluster.node for rank in group}) == 1

    def _held(self) -> tuple[float, float]:
        """Weights of a rank outside of experts, and of its experts, before data ranks divide them."""
        m, s = self.model, self.size
        ends = 2 * m.vocab * m.hidden / s["tensor"] / min(s["pipeline"], 2)
        dense = self.layers * m.dense / s["tensor"] + ends
        return dense, self.layers * m.routed / (s["expert"] * s["expert_tensor"])

    def _weights(self, micro: float) -> float:
        """Seconds of messages of weights and gradients that are not hidden."""
        dense, routed = self._held()
        copies = self.size["data"] * self.size["sequence"], self.size["expert_data"]
        groups = self.mapping.grids.groups("data", "sequence")[0], self.mapping.grids.groups("expert_data")[0]
        each = 0.0  # seconds per byte and weight, gathered once
        for held, count, group in zip((dense, routed), copies, groups, strict=True):
            if count > 1:
                link = self.cluster.inside if self._inside(group) else self.cluster.between
                each += held * (count - 1) / count / link.bandwidth
        if self.mapping.gathered:
            # bf16 weights for the forward and for the backward pass, fp32 gradients; each micro-batch, beside its work.
            return self.micros * max(0.0, (2 + 2 + 4) * each - micro)
        return max(0.0, (2 + 4) * each - micro)  # once, beside the last micro-batch

    def _memory(self) -> float:
        """Bytes of the fullest rank, the first of the pipeline: bf16 weights, fp32 gradients, master and moments."""
        m, s = self.model, self.size
        dense, routed = self._held()
        over = s["data"] * s["sequence"], s["expert_data"]
        if self.mapping.gathered:
            state = 18 * (dense / over[0] + routed / over[1]) + 2 * (2 + 4) * (dense + routed) / m.layers
        else:
            state = 6 * (dense + routed) + 12 * (dense / over[0] + routed / over[1])
        et, t = s["expert_tensor"], s["tensor"]
        attention = self.tokens * (6 * m.hidden + 2 * (m.heads + m.kv_heads) * m.head_width + 3 * m.shared)
        experts = self.tokens * m.top_k * (m.hidden * (1 + et) + 3 * m.width)
        kept = 2 * (self.tokens * m.hidden if self.mapping.recompute else attention + experts)
        flight = min(self.micros, s["pipeline"] * (1 + (s["pipeline"] - 1) / (s["pipeline"] * self.mapping.chunks)))
        logits = self.sequence / s["sequence"] * m.vocab / t * 6
        once = 2 * (attention + experts) if self.mapping.recompute else 0.0
        return state + kept * self.layers * flight + once + logits + RESERVED
