"""Lazy checkpoints: training goes on while its state is copied to host memory, and from there to disk.

`save` only notes the tensors. They do not change before the next update, and until then a worker copies them, piece by
piece, into a ring of host memory, from which another writes them to disk. The update waits (`fence`) only for what has
not been copied by then.

Source: Maurya et al., DataStates-LLM: Lazy Asynchronous Checkpointing for Large Language Models, HPDC 2024,
arXiv 2406.10707.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from headway.core.errors import CheckpointError
from headway.core.options import Options as BaseOptions
from headway.core.units import Bytes, Count
from headway.resilience.folders import clean
from headway.resilience.ranks import Ranks
from headway.resilience.reading import SavedStates

if TYPE_CHECKING:
    import torch

    from headway.memory.lanes import Lanes
    from headway.resilience.pipeline import Pipeline

Until = Literal["staged", "persisted", "committed"]


class LazyCheckpointer(SavedStates):
    """Saves a nested state of tensors and plain data (see ``flatten``) in ``folder`` while training goes on.

    On disk it is what `PlainCheckpointer` writes, and either reads the other's. Between `save` and the next change of
    the saved tensors somebody must call `fence`: Headway's trainer does, and `attach` has a torch optimizer do it. A
    tensor that was changed without is found out and its checkpoint given up; from then on that tensor is copied
    when it is saved.

    Under torch.distributed every process calls `save` for the same steps. Each writes its parts of DTensors; of plain
    tensors and data, process 0's are saved, and those that process 0 does not have. `load(into=...)` reads DTensors of
    any other layout and number of processes.

    A checkpoint that cannot be written does not stop training: the one before it stays the newest, the next call says
    so through ``fallback`` (an error in a strict run), and `wait` raises if it was the last.

    Args:
        options: how often, how many, how much host memory.
        folder: made when the first checkpoint is saved. What killed writers left in it is removed.
        lanes: to share, or with injected rates; default: its own.
        timeout: seconds after which a silent process counts as gone.

    Raises:
        CheckpointError: ``folder`` is a file, or several processes were to choose ``every`` each.
    """

    class Options(BaseOptions):
        """When and how a run is saved."""

        mode: Literal["lazy"] = "lazy"
        """How: `lazy` saves while training goes on; `plain` writes everything before it does. Both read the same."""
        every: Count | Literal["auto"] | None = None
        """Optimizer steps between checkpoints; `null` saves only at the end and when interrupted; `auto` measures what
        a checkpoint costs and saves as often as `overhead` allows."""
        overhead: float = Field(0.035, gt=0, le=1)
        """With `every: auto`: the share of the time that checkpoints may cost."""
        keep: int = Field(2, ge=1)
        """How many of the newest checkpoints stay; one at least is wise as a spare for a damaged newest."""
        host_cache: Bytes = Field(2 << 30, ge=1 << 16)
        """Host memory for copies on their way to disk, at most; no more is taken than the state has. With less than
        the state has, the update waits until the disk has taken the rest."""
        tiers: tuple[Literal["host", "disk"], ...] = ("host", "disk")
        """Where a checkpoint goes on its way: `[disk]` does without copies in host memory, but for some megabytes."""

        @field_validator("every", mode="before")
        @classmethod
        def _whole(cls, value: Any) -> Any:
            if value is None or value == "auto":
                return value
            from headway.core.units import count

            steps = count(value)
            if steps < 1:
                raise ValueError("greater than or equal to 1")
            return steps

        @field_validator("tiers")
        @classmethod
        def _ends_on_disk(cls, value: tuple[str, ...]) -> tuple[str, ...]:
            if value not in (("host", "disk"), ("disk",)):
                raise ValueError("expected [host, disk] or [disk]")
            return value

    def __init__(
        self, options: Options, folder: str | Path, lanes: Lanes | None = None, timeout: float = 600.0
    ) -> None:
        super().__init__(folder)
        self.options = options
        self._ranks = Ranks(self.folder, timeout)
        if self._ranks.world > 1 and options.every == "auto":
            raise CheckpointError("checkpoint.every", "is auto: every process would choose its own from its own times",
                                  expected="a number of steps, the same in all")  # fmt: skip
        self._lanes = lanes
        self._made: Pipeline | None = None
        self._loads = 0
        if self._ranks.rank == 0:
            clean(self.folder)
        from headway.resilience.interval import Interval

        self._interval = Interval(options.overhead) if options.every == "auto" else None

    @property
    def every(self) -> int | None:
        """Optimizer steps between checkpoints; None: only at the end and on interruption, or not known yet."""
        if self._interval is not None:
            return self._interval.every
        return self.options.every  # type: ignore[return-value]

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Begin to save ``state`` as the checkpoint of ``step``; where it will be.

        Raises:
            CheckpointError: the state holds what cannot be saved.
            HeadwayError: in a strict run, an earlier checkpoint could not be written.
        """
        return self._pipeline.save(step, state)

    def fence(self) -> None:
        """The saved tensors are about to change: return once they have all been copied."""
        if self._made is not None:
            self._made.fence()
        elif self._interval is not None:
            self._pipeline.fence()

    def wait(self, until: Until = "committed") -> None:
        """Return once everything saved has been copied (``staged``), written and synced by this process
        (``persisted``), or can be loaded after a crash (``committed``).

        Raises:
            CheckpointError: the newest checkpoint could not be written.
        """
        if self._made is not None:
            self._made.wait(until)

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Have ``optimizer`` call `fence` before each of its steps; returns torch's handle, whose `remove` undoes it.

        For a loop of one's own; every optimizer whose state is saved needs it. One that steps inside the backward pass
        leaves nothing to overlap: its first step waits for the whole state.
        """
        return optimizer.register_step_pre_hook(lambda *_: self.fence())

    def load(self, into: dict[str, Any] | None = None, optional: Collection[str] = ()) -> dict[str, Any] | None:
        """The state of the newest complete checkpoint, or None if there is none.

        A damaged one is passed over, through ``fallback``, for the one before it. Under torch.distributed all
        processes call this, and process 0 chooses.

        Args:
            into: a state whose tensors are read in place, each DTensor its own parts; names as they were saved. Without
                it, whole tensors on the CPU.
            optional: keys of ``into`` under which an entry that was not saved is left out of what comes back.

        Raises:
            CheckpointError: there are checkpoints and all are damaged, the newest was written by a newer Headway, or
                ``into`` has tensors that were not saved.
        """
        if self._made is not None:
            self._made.drain()
        if self._ranks.world == 1:
            found = self._newest(into, optional)
            return found and found[1]
        topic, self._loads = f"load-{self._loads}", self._loads + 1
        if self._ranks.rank == 0:
            try:
                found = self._newest(into, optional)
            except BaseException as error:
                self._ranks.tell(topic, {"error": str(error)})
                raise
            self._ranks.tell(topic, {"path": found and str(found[0])})
            return found and found[1]
        chosen = self._ranks.hear(topic, 0)
        if "error" in chosen:
            raise CheckpointError(str(self.folder), f"rank 0 cannot load it ({chosen['error']})")
        return self._read(Path(chosen["path"]), into, optional, verified=True) if chosen["path"] else None

    def status(self) -> dict[int, str]:
        """Step -> how far its checkpoint is, for those saved since the last `wait`: ``staging``, ``staged``,
        ``persisted``, ``committed``, ``failed: why``."""
        return self._made.status() if self._made is not None else {}

    def report(self) -> dict[str, Any]:
        """What saving has cost: checkpoints, bytes, seconds in which training waited, what each lane carried."""
        return self._pipeline.report()

    def close(self) -> None:
        """Write what has been copied, then give back threads and memory; what cannot be written is told of."""
        if self._made is not None:
            self._made.close()
            self._made = None

    @property
    def _pipeline(self) -> Pipeline:
        if self._made is None:
            from headway.resilience.pipeline import Pipeline

            self._made = Pipeline(self.folder, self.options, self._ranks, self._damaged, self._lanes, self._interval)
        return self._made
