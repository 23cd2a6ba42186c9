"""The arms of throughput.py: one training each, advanced a block of steps at a time.

As a command (`python benchmarks/arms.py ARM HIDDEN LAYERS`) it answers requests on standard input: `steps N` with the
seconds that N steps took, and, if it is Headway's, `flops` with those per token and `peak` with the machine's
matrix-product rate.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

BATCH, SEQUENCE, VOCAB = 8, 512, 4096
ARMS = (
    "headway-bf16",
    "headway-bf16-compile",
    "transformers-fp32",
    "transformers-bf16",
    "transformers-bf16-compile",
)
MARK = "benchmark:"  # before every answer: libraries print, too
_FOREVER = 10**6  # steps of a training that is only ever stopped
_WARM_UP = 3


def recipe(arm: str, hidden: int, layers: int) -> dict[str, Any]:
    """What Headway trains."""
    return {
        "name": "throughput",
        "model": {"family": "llama", "hidden": hidden, "layers": layers, "heads": hidden // 64, "context": SEQUENCE},
        "data": {"source": "python-stdlib", "tokenizer": "bpe", "vocab": VOCAB, "sequence": SEQUENCE},
        "train": {"steps": _FOREVER, "batch": BATCH, "precision": "bf16", "compile": arm.endswith("compile")},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "schedule": {"name": "cosine", "warmup": 100},
    }


def peer_config(hidden: int, layers: int) -> dict[str, Any]:
    """The same model as transformers describes it."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": -(-8 * hidden // (3 * 64)) * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "max_position_embeddings": SEQUENCE,
        "tie_word_embeddings": True,
        "use_cache": False,
    }


def headway_trainer(arm: str, hidden: int, layers: int) -> Any:
    """Headway's own trainer."""
    from headway.core.build import build_trainer
    from headway.core.recipe import Recipe

    return build_trainer(Recipe.load(recipe(arm, hidden, layers)))


def run_headway(arm: str, hidden: int, layers: int, requests: Iterator[str]) -> None:
    """Answer requests with Headway's training."""
    import torch

    from headway.core.meters import measure_matmul_peak

    trainer = headway_trainer(arm, hidden, layers)
    for _ in range(_WARM_UP):
        trainer.train_step()
    answer("ready")
    for request in requests:
        if request == "flops":
            answer(trainer.workload.flops_per_token(trainer.model))
        elif request == "peak":
            answer(measure_matmul_peak(torch.bfloat16, trainer.device))
        else:
            start = time.perf_counter()
            for _ in range(int(request.split()[1])):
                trainer.train_step()
            answer(time.perf_counter() - start)


def run_transformers(arm: str, hidden: int, layers: int, requests: Iterator[str]) -> None:
    """Answer requests with the training of transformers.Trainer, which is held between blocks by a callback."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    from headway.core.recipe import Recipe
    from headway.data.pipeline import build_data

    tokens = build_data(Recipe.load(recipe(arm, hidden, layers)).data, 0).train  # the same text, cut in the same way

    class Text(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(tokens)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            item = torch.as_tensor(tokens[index]["tokens"])
            return {"input_ids": item, "labels": item}

    class Gate(TrainerCallback):
        """Waits at the end of a block for the request of the next."""

        left, started = _WARM_UP, 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.left -= 1
            if self.left:
                return
            answer(time.perf_counter() - self.started)
            request = next(requests, None)
            if request is None:
                control.should_training_stop = True
                return
            self.left, self.started = int(request.split()[1]), time.perf_counter()

    set_seed(0)
    config = LlamaConfig(**peer_config(hidden, layers))
    folder = tempfile.TemporaryDirectory()  # the Trainer wants one, but writes nothing
    arguments = TrainingArguments(
        output_dir=folder.name,
        max_steps=_FOREVER,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16="bf16" in arm,
        torch_compile=arm.endswith("compile"),
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=Text(), callbacks=[Gate()]).train()


def profile(arm: str, hidden: int, layers: int, steps: int = 5) -> None:
    """Print which operations a step of Headway consists of."""
    import torch

    from headway.core.meters import without_native_stderr

    trainer = headway_trainer(arm, hidden, layers)
    for _ in range(_WARM_UP):
        trainer.train_step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with without_native_stderr():
        profiler = torch.profiler.profile(activities=activities)
        profiler.start()
    for _ in range(steps):
        trainer.train_step()
    with without_native_stderr():
        profiler.stop()
    events = [e for e in profiler.key_averages() if e.self_cpu_time_total + e.self_device_time_total > 0]
    time_of: Callable[[Any], float] = lambda e: e.self_device_time_total or e.self_cpu_time_total  # noqa: E731
    total = sum(map(time_of, events))
    print(f"{arm}, hidden {hidden}, {layers} layers: {total / steps / 1e3:.0f} ms of operations a step")
    for event in sorted(events, key=time_of, reverse=True)[:25]:
        print(f"  {time_of(event) / total:6.1%} {event.count // steps:6d} times  {event.key[:80]}")


def answer(value: object) -> None:
    """Reply to a request."""
    print(MARK, value, flush=True)


if __name__ == "__main__":
    arm, hidden, layers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    lines = (line.strip() for line in sys.stdin)
    (run_headway if arm.startswith("headway") else run_transformers)(arm, hidden, layers, lines)
