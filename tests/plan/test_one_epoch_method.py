"""The switch: every sequence at most once across ranks and resumes, no dropout, no smoothing, the planned size.

Needs torch. Run: pytest tests/plan/test_one_epoch_method.py
"""

import hashlib
from collections import Counter

import pytest
import torch
from tests.conftest import generated_text, tiny_recipe
from torch import nn

from headway.core.build import build_trainer
from headway.core.errors import CheckpointError, HeadwayError, MethodError, RecipeError
from headway.core.recipe import Recipe
from headway.data.loader import Stream
from headway.plan.one_epoch import measure
from headway.plan.one_epoch.method import OneEpoch, OneEpochOptions

SMALL = {"source": "memory", "documents": generated_text(4), "tokenizer": "byte", "sequence": 32}


def trainer(options=None, **sections):
    return build_trainer(Recipe.load(tiny_recipe(methods={"one-epoch": options or {}}, **sections)))


def rows(batch):
    """Each counted sequence of a step, as a digest."""
    for part in batch.micro:
        for tokens, targets in zip(part["tokens"], part["targets"]):
            if (targets >= 0).any():
                yield hashlib.blake2b(tokens.numpy().tobytes() + targets.numpy().tobytes()).digest()


def method_on(stream, **sections):
    method = OneEpoch(OneEpochOptions(), Recipe.load(tiny_recipe(**sections)))
    return method, method.stream(stream)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stop_at", [None, 3])
def test_each_sequence_comes_exactly_once_over_ranks_and_restarts(world, stop_at):
    dataset = trainer(data=SMALL).stream.dataset
    expected = Counter(rows(type("B", (), {"micro": [dataset.batch(range(len(dataset)))]})))
    seen = Counter()
    targets = 0
    for rank in range(world):

        def fresh(rank=rank):
            return method_on(Stream(dataset, batch=4, micro_batch=2, seed=1, rank=rank, world=world))

        method, stream = fresh()
        for number, batch in enumerate(stream):
            seen.update(rows(batch))
            targets += batch.targets if rank == 0 else 0
            if number == stop_at:
                break
        if stop_at is not None:
            state, saved = stream.state_dict(), method.state_dict()
            method, stream = fresh()
            stream.load_state_dict(state)
            method.load_state_dict(saved)
            for batch in stream:
                seen.update(rows(batch))
                targets += batch.targets if rank == 0 else 0
        assert method.passes == 1.0
    assert seen == expected
    assert targets == dataset.targets  # T / D = 1, counted in tokens


def test_the_run_ends_with_the_data_and_says_so_at_the_start(capsys):
    made = trainer(data=SMALL, train={"steps": 1000, "batch": 4})
    said = capsys.readouterr().err
    assert "epochs of" in said
    assert "of 1000 steps" in said
    made.fit()
    assert made.step == -(-len(made.stream.dataset) // 4)
    assert made.methods[0].passes == 1.0
    with pytest.raises(StopIteration):
        next(made.stream)


def test_too_long_a_run_is_an_error_where_fallbacks_are():
    with pytest.raises(HeadwayError, match=r"epochs of .*one epoch feeds"):
        trainer(data=SMALL, train={"steps": 10_000}, strict=True, model={"hidden": 64, "layers": 4})


def test_a_short_run_says_nothing_and_has_the_plain_runs_losses(capsys):
    plain = build_trainer(Recipe.load(tiny_recipe()))
    ours = trainer()
    assert "fallback" not in capsys.readouterr().err
    assert [ours.train_step()["loss"] for _ in range(5)] == [plain.train_step()["loss"] for _ in range(5)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_is_off(family):
    model = {"family": family, "dropout": 0.3}
    without = build_trainer(Recipe.load(tiny_recipe(model={"family": family})))
    ours = trainer(model=model)
    assert any("dropout taken off" in change and "0.3" in change for change in ours.changes["one-epoch"])
    assert [ours.train_step()["loss"] for _ in range(3)] == [without.train_step()["loss"] for _ in range(3)]


def test_dropout_that_the_configuration_does_not_name_is_off_too():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_dropout, self.keep = 0.2, nn.Dropout(0.1)

    method = OneEpoch(OneEpochOptions(), Recipe.load(tiny_recipe()))
    model = method.model(nn.Sequential(Attention(), nn.Dropout(0.5), nn.Dropout(0.0), nn.Linear(2, 2)))
    assert (model[0].attention_dropout, model[0].keep.p, model[1].p) == (0.0, 0.0, 0.0)
    assert [change.count for change in method.changes()] == [3]


def test_smoothed_labels_are_refused_by_name_and_by_loss():
    with pytest.raises(MethodError, match="regularisation only slows"):
        build_trainer(Recipe.load(tiny_recipe(methods={"one-epoch": {}, "label-smoothing": {}})))

    class Smoothed:
        label_smoothing = 0.1

    with pytest.raises(MethodError, match="smoothed labels"):
        OneEpoch(OneEpochOptions(), Recipe.load(tiny_recipe())).loss(Smoothed())


def test_a_ratio_resizes_the_model_to_the_runs_tokens():
    made = trainer({"ratio": 5}, train={"steps": 500}, model={"dropout": 0.1})
    size = measure(made.model.config)
    assert 500 * 4 * 32 / size.parameters == pytest.approx(5, rel=0.35)
    assert any("model resized" in change and "tokens per parameter" in change for change in made.changes["one-epoch"])
    assert made.model.config.dropout == 0
    assert made.model.config.context == 64
    made.train_step()


def test_a_budget_names_the_steps_it_pays_for_and_takes_them():
    options = {"budget": {"flops": 5e9}, "ratio": 1}
    with pytest.raises(MethodError, match=r"budget: pays for .* Set train.steps=(\d+)") as refused:
        trainer(options)
    steps = int(str(refused.value).rsplit("=", 1)[1])
    made = trainer(options, train={"steps": steps})
    spent = steps * 4 * 32 * made.model.flops_per_token(32)
    assert spent == pytest.approx(5e9, rel=0.02)
    assert made.changes["one-epoch"]
    timed = {"budget": {"time": "5s", "flops_per_second": 1e9}, "ratio": 1}
    assert trainer(timed, train={"steps": steps}).model.config == made.model.config


def test_resuming_with_data_that_starts_over_is_refused():
    made = trainer()
    made.train_step()
    state = made.state_dict()
    state["stream"]["position"] = 0
    with pytest.raises(CheckpointError, match=r"sequence 0, though 4 have been used"):
        trainer().load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "sections", "says"),
    [
        ({}, {"data": {"max_passes": 2}}, "allows one pass, but data.max_passes is 2"),
        ({}, {"data": {"max_passes": 1, "on_exhausted": "warn"}}, "data.on_exhausted warn"),
        ({}, {"data": {"max_passes": 1}}, "changed nothing"),
        ({"ratio": 5}, {"train": {"steps": None, "time": "10s"}}, "how many tokens the run has"),
        ({"ratio": 5}, {"train": {"steps": 1}}, "ratio: wants 25.6 parameters.*nearest size"),
        ({"ratio": 5}, {"methods": {"token-accumulation": {"targets": 200}}}, "cannot tell how many tokens"),
        ({"ratio": 5}, {"train": {"steps": 500, "from": "runs/x"}}, "would resize the model that train.from loads"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_remedy(options, sections, says):
    methods = {"one-epoch": options, **sections.pop("methods", {})}
    with pytest.raises(MethodError, match=says):
        build_trainer(Recipe.load(tiny_recipe(methods=methods, **sections)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 0}, "methods.one-epoch.ratio"),
        ({"ratoi": 5}, "Did you mean 'ratio'"),
        ({"budget": {}}, "either flops, or time"),
        ({"budget": {"flops": 1e9, "time": "1h"}}, "either flops, or time"),
        ({"budget": {"time": "1h"}}, "time and flops_per_second together"),
    ],
)
def test_bad_options_are_refused_with_their_path(options, says):
    with pytest.raises(RecipeError, match=says):
        Recipe.load(tiny_recipe(methods={"one-epoch": options}))


def test_a_stream_that_is_not_counted_is_refused():
    with pytest.raises(MethodError, match="cannot count the passes of a list_iterator"):
        method_on(iter([]))


def test_the_data_order_is_the_plain_runs():
    plain, ours = build_trainer(Recipe.load(tiny_recipe())), trainer()
    for _ in range(4):
        assert torch.equal(next(plain.stream).micro[0]["tokens"], next(ours.stream).micro[0]["tokens"])
