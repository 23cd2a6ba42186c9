"""The engine of a run on many ranks: puts the dimensions of a layout together in the one order in which they fit.

pipeline: the rank's stages            split
tensor: its part of each matrix
experts: its experts
sequence: its part of each sequence
methods, such as recomputation         (core/build.py)
compile
shard: FSDP2 around what is left       shard
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.core.clip import local
from headway.core.engine import Engine
from headway.core.errors import RecipeError
from headway.core.method import ForwardBackward, Gradients, Loss
from headway.core.recipe import Recipe
from headway.core.trainer import Trainer
from headway.core.workload import StepBatch, Workload
from headway.models.structure import structure
from headway.parallel.clip import clip_divided_
from headway.parallel.legality import SCAN_KINDS, check_layout, micro_batch, sequence_kind
from headway.parallel.mesh import Mesh, own_group, settle
from headway.parallel.sequence.stream import SharedSequences
from headway.parallel.shard import reshard, shard_weights
from headway.parallel.start import join_ranks, local_rank, ranks_on_machine
from headway.parallel.states import make_optimizer_state, tensors_of, with_others, without
from headway.resilience.folders import checkpoints

if TYPE_CHECKING:
    from headway.parallel.pipeline import Cuts, PipelineRunner, Stage
    from headway.parallel.pipeline.trace import Span

SHARED = "embedding.weight"
"""The matrix that embedding and head may share."""
EXPERTS = ("blocks.*.mlp.experts",)
"""What tensor parallelism leaves to expert parallelism."""


class ParallelEngine(Engine):
    """One of the ranks of a recipe's ``parallel`` section.

    Raises:
        RecipeError: the recipe cannot be laid out on so many ranks.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.rank, self.world = join_ranks()
        self.layout = settle(recipe.parallel, self.world, recipe.train.batch)
        check_layout(recipe, self.layout)
        self.layout_name = str(self.layout)
        self.devices = self.world if torch.cuda.is_available() else 1
        self._control = dist.new_group(backend="gloo") if torch.cuda.is_available() else None
        self._made: Mesh | None = None
        at = self.layout.coordinates(self.rank)
        self.data_rank = at["replicate"] * self.layout.shard + at["shard"]
        self.data_ranks = self.layout.data
        self._speaks = at["tensor"] == at["pipeline"] == 0  # for the ranks that find the same losses
        self._size = (0, 0.0)
        self._changes: list[str] = []
        self._tied = self._restart = False
        self._cuts: Cuts | None = None
        self._stages: list[Stage] = []
        self._runner: PipelineRunner | None = None

    @property
    def mesh(self) -> Mesh:
        """The process groups of the layout."""
        if self._made is None:
            self._made = Mesh(self.layout, self.rank, self.device_type)
        return self._made

    @property
    def device_type(self) -> str:
        """Where the model is: ``cpu`` or ``cuda``."""
        return "cuda" if torch.cuda.is_available() and self.recipe.train.device != "cpu" else "cpu"

    @property
    def share(self) -> int:
        """Sequences of a step that this rank trains on."""
        return self.recipe.train.batch // self.data_ranks

    @property
    def micro_batch(self) -> int:
        """Sequences that pass through the model together."""
        return micro_batch(self.recipe, self.layout)

    @property
    def stream_micro_batch(self) -> int:
        """A pipeline divides the rank's share itself."""
        return self.share if self.layout.pipeline > 1 else self.micro_batch

    def device(self, wanted: torch.device) -> torch.device:
        """The GPU of this rank's number on its machine.

        Raises:
            RecipeError: there are fewer GPUs than ranks, and NCCL has no two ranks share one.
        """
        if wanted.type != "cuda":
            return wanted
        gpus, ranks = torch.cuda.device_count(), ranks_on_machine()
        if ranks > gpus and "CUDA_VISIBLE_DEVICES" not in os.environ:  # through which each may be given its own
            raise RecipeError("train.device", f"gives each rank a GPU, and this machine has {gpus} for {ranks} ranks",
                              hint=f"start {gpus}, or take train.device=cpu")  # fmt: skip
        return torch.device("cuda", local_rank() % gpus)

    def split(self, model: nn.Module, workload: Workload) -> nn.Module:
        """Keep this rank's part of the model and teach it to talk to the others'."""
        self._size = sum(p.numel() for p in model.parameters()), workload.flops_per_token(model)
        layout, options = self.layout, self.recipe.parallel
        if layout.pipeline > 1:
            from headway.parallel.pipeline import keep_own_parts

            self._tied = structure(model).tied
            self._changes += keep_own_parts(model, self.cuts(model), self.mesh.at["pipeline"])
        if layout.tensor > 1:
            from headway.parallel.tensor import tensor_parallel

            apart = EXPERTS if self._experts else ()
            self._changes += tensor_parallel(model, self.mesh["tensor"], sequence=options.tensor.sequence, apart=apart)
        if self._experts:
            from headway.parallel.experts.parallel import expert_parallel

            meshes = self._experts["expert"], self._experts["expert_tensor"]
            self._changes += expert_parallel(model, *meshes, dispatcher=options.experts.dispatcher)
        if layout.sequence > 1:
            self._changes += self._share_sequences(model)
        return model

    def _share_sequences(self, model: nn.Module) -> list[str]:
        from headway.parallel.sequence.apply import restarts_positions, sequence_parallel
        from headway.parallel.sequence.linear import scan_parallel

        options, kind, mesh = self.recipe.parallel.sequence, sequence_kind(self.recipe), self.mesh["sequence"]
        self._restart = restarts_positions(model)
        if kind in SCAN_KINDS:
            return scan_parallel(model, mesh, method=kind, blocks=options.blocks)
        return sequence_parallel(model, mesh, kind=kind, ring=options.ring, layout=options.layout)

    def stream(self, stream: Iterator[StepBatch]) -> Iterator[StepBatch]:
        """The rank's part of each sequence."""
        if self.layout.sequence == 1:
            return stream
        return SharedSequences(stream, self._part, self._sharing)

    @cached_property
    def _sharing(self) -> Any:
        """The ranks that share sequences; with GPUs by gloo, which carries batches before they are on a device."""
        if not torch.cuda.is_available():
            return self.mesh["sequence"].get_group()
        return own_group(self.layout.groups("sequence"), self.rank, "gloo")

    def _part(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        from headway.parallel.sequence.batch import shard_batch

        options = self.recipe.parallel.sequence
        return shard_batch(batch, self.mesh.at["sequence"], self.layout.sequence, kind=sequence_kind(self.recipe),
                           ring=options.ring, layout=options.layout, restart=self._restart)  # fmt: skip

    @cached_property
    def _experts(self) -> Any:
        """The experts' own mesh; None where every rank has all of them."""
        layout = self.layout
        if layout.expert * layout.expert_tensor == 1:
            return None
        from headway.parallel.experts.grids import fold
        from headway.parallel.experts.parallel import expert_mesh

        grids = fold(
            layout.world,
            pipeline=layout.pipeline,
            sequence=layout.sequence,
            tensor=layout.tensor,
            expert=layout.expert,
            expert_tensor=layout.expert_tensor,
            tensor_sequence=self.recipe.parallel.tensor.sequence,
        )
        return expert_mesh(grids, self.device_type)

    def cuts(self, model: Any) -> Cuts:
        """Where the blocks are cut: embedding and head count by their work beside a block's."""
        if self._cuts is None:
            from headway.parallel.pipeline import cut_blocks

            options, config = self.recipe.parallel.pipeline, model.config
            block = sum(p.numel() for p in model.blocks[-1].parameters())
            self._cuts = cut_blocks(
                len(model.blocks),
                options.degree,
                options.chunks,
                head=config.vocabulary * config.hidden / block,
                there_and_back=options.schedule == "zbv-zero-bubble",
            )
        return self._cuts

    def shard(self, model: nn.Module) -> None:
        """FSDP2 over the ranks that run the same part on other samples or other tokens."""
        if self.layout.pipeline > 1:
            from headway.parallel.pipeline import make_stages

            self._stages = make_stages(model, self.cuts(model), self.mesh.at["pipeline"])
        if self._sharded:
            parts: list[nn.Module] = [*self._stages] or [model]
            experts = self._experts and self._experts["expert_data"]
            self._changes += shard_weights(model, parts, self.mesh.weights(), self.recipe.train.precision, experts)

    @property
    def _sharded(self) -> bool:
        layout = self.layout
        stage, apart = layout.world // layout.pipeline, layout.expert * layout.expert_tensor
        return layout.data * layout.sequence > 1 or (apart > 1 and stage > apart)

    def weights_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """FSDP2 keeps fp32 weights, divided, and casts them as it gathers them."""
        return torch.float32 if self._sharded and dtype == torch.bfloat16 else dtype

    def gradients(self, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None) -> Gradients:
        """Clip by the norm over all ranks."""
        holders = self.world // self.layout.pipeline
        masters: dict[Tensor, Tensor] = getattr(optimizer, "masters", {})
        tied = [p for name, p in model.named_parameters() if name == SHARED and p.requires_grad] if self._pair else []
        shared = [masters.get(p, p) for p in tied]
        elsewhere = set() if self.mesh.at["pipeline"] == 0 else set(shared)

        def gradients() -> Tensor:
            for parameter in shared:
                dist.all_reduce(local(parameter.grad), group=self._pair)  # type: ignore[arg-type]
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            return clip_divided_(trained, clip, holders, elsewhere, self._control)

        return gradients

    @cached_property
    def _pair(self) -> Any:
        """The ranks with the first and the last stage, where embedding and head share a matrix that both then hold."""
        if not self._tied or self._cuts is None or self._cuts.rank_of(self._cuts.stages - 1) == 0:
            return None
        last = self._cuts.rank_of(self._cuts.stages - 1)
        return own_group(([group[0], group[last]] for group in self.layout.groups("pipeline")), self.rank)

    def forward_backward(self, model: nn.Module, loss: Loss) -> ForwardBackward:
        """One micro-batch; with a pipeline, all of them, through its stages."""
        if not self._stages:
            return super().forward_backward(model, loss)
        for stage in self._stages:
            stage.loss = loss
        return self._pipeline(model).forward_backward

    def _pipeline(self, model: Any) -> PipelineRunner:
        if self._runner is None:
            from headway.parallel.pipeline import PipelineRunner

            between = self.layout.sequence * (self.layout.tensor if self.recipe.parallel.tensor.sequence else 1)
            weight = next(model.parameters())
            sharded_half = self._sharded and self.recipe.train.precision == "bf16"
            self._runner = PipelineRunner(
                self._stages,
                self.cuts(model),
                self.mesh["pipeline"],
                schedule=self.recipe.parallel.pipeline.schedule,
                micro_batches=self.share // self.micro_batch,
                width=model.config.hidden,
                tokens=self.recipe.data.sequence // between,  # type: ignore[attr-defined]
                dtype=torch.bfloat16 if sharded_half else weight.dtype,
                device=weight.device,
                tensor=self.mesh["tensor"] if self._sends_parts else None,
            )
        return self._runner

    @property
    def _sends_parts(self) -> bool:
        """Tensor ranks hold the same between two stages, and each sends its part of it."""
        options = self.recipe.parallel
        return self.layout.tensor > 1 and not options.tensor.sequence and options.pipeline.gather

    def evaluate(self, model: nn.Module, loss: Loss, batch: dict[str, Tensor]) -> float:
        """As one process does, on this rank's part of the sequences."""
        batch = self._part(batch) if self.layout.sequence > 1 else batch
        if self._stages:
            kept = self._stages[-1].loss
            self._stages[-1].loss = loss
            value = self._pipeline(model).evaluate(batch)
            self._stages[-1].loss = kept
        else:
            value = super().evaluate(model, loss, batch)
        parts: list[nn.Module] = [*self._stages] or [model]
        for part in parts:
            reshard(part)
        return value

    def begin_step(self, step: int) -> None:
        """Give the step's random numbers a seed of its own, other than that of ranks with other samples."""
        at = self.layout.coordinates(self.rank)
        place = (at["pipeline"] * self.data_ranks + self.data_rank) * self.layout.sequence + at["sequence"]
        torch.manual_seed(((self.recipe.seed * 1_000_003 + step) * 65_537 + place) % 2**63)

    def total(self, value: float) -> float:
        """Ranks that find the same losses count once."""
        return self._reduce(value if self._speaks else 0.0, dist.ReduceOp.SUM)

    def highest(self, value: float) -> float:
        """Over all ranks."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Over all ranks."""
        return bool(self._reduce(float(flag), dist.ReduceOp.MAX))

    def _reduce(self, value: float, operation: Any) -> float:
        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number, operation, group=self._control)
        return float(number)

    def common(self, value: Any) -> Any:
        """Rank 0's."""
        shared = [value]
        dist.broadcast_object_list(shared, src=0, group=self._control)
        return shared[0]

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Local rank 0 of each machine goes first."""
        first = local_rank() == 0
        if not first:
            dist.barrier(group=self._control)
        try:
            yield
        finally:
            if first:
                dist.barrier(group=self._control)

    def load(self, trainer: Trainer) -> dict[str, Any] | None:
        """The newest checkpoint, whatever layout wrote it: every rank reads its own parts."""
        if self.world == 1:
            return super().load(trainer)  # of any checkpointer and optimizer
        folder = getattr(trainer.checkpointer, "folder", None)
        if not self.common(folder is not None and bool(checkpoints(folder))):
            return None
        make_optimizer_state(trainer.optimizer)
        state = trainer.state_dict()
        state["rng"].pop("cuda", None)  # `begin_step` seeds the GPUs, of which there may be others now
        # A parameter that never had a gradient, has no state of the optimizer's either.
        loaded: Any = trainer.checkpointer.load(into=state, optional=["optimizer"])  # type: ignore[call-arg]
        loaded["rng"].pop("cuda", None)
        own = {key: {name: loaded[key][name] for name in state[key] if name in loaded[key]}
               for key in ("model", "optimizer")}  # fmt: skip
        return {**loaded, **own}  # without the names of what other stages hold

    def to_save(self, state: dict[str, Any]) -> dict[str, Any]:
        """Every rank saves what it has; rank 0, which writes down the structure, is told of what the others have. A
        matrix that two stages hold is saved by the first."""
        if self.layout.pipeline == 1:
            return state
        if self._pair is not None and self.mesh.at["pipeline"] > 0:
            state = without(state, SHARED)
        everywhere: list[Any] = [None] * self.world
        dist.all_gather_object(everywhere, tensors_of(state), group=self._control)
        for other in everywhere:
            state = with_others(state, other)
        return state

    def model_size(self, trainer: Trainer) -> tuple[int, float]:
        """Of the model before it was divided."""
        return self._size

    def timeline(self) -> list[Span]:
        """The passes of the last step through the pipeline's stages; empty without a pipeline. All ranks call it."""
        return self._runner.timeline() if self._runner is not None else []

    def report(self) -> dict[str, Any]:
        """The layout, and what was done to the model."""
        if self.world == 1:
            return {}
        return {"ranks": self.world, "layout": self.layout_name, "changes": self._changes}
