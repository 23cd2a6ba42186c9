"""Nested states survive the way to JSON and tensors and back, bit for bit and type for type.

Needs: torch, hypothesis.
Run: pytest tests/resilience/test_flatten.py
"""

import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from headway.core.errors import CheckpointError
from headway.resilience.flatten import flatten, unflatten
from tests.resilience.states import same, states


@settings(max_examples=300, deadline=None)
@given(states)
def test_round_trip_through_json(state):
    encoded, table = flatten(state)
    assert same(unflatten(json.loads(json.dumps(encoded, allow_nan=False)), table), state)


def test_same_state_gives_same_names():
    state = {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1), "list": [torch.ones(2), {"x": torch.ones(3)}]}
    assert list(flatten(state)[1]) == ["a.b", "a.b~2", "list.0", "list.1.x"]
    assert json.dumps(flatten(state)[0]) == json.dumps(flatten(state)[0])


def test_integers_beyond_pythons_digit_limit():
    value = 7**20000
    encoded, _ = flatten([value, -value])
    assert unflatten(json.loads(json.dumps(encoded)), {}) == [value, -value]


def test_subclasses_of_plain_types_become_plain():
    encoded, _ = flatten({"a": np.float64(0.1), "b": OrderedDict(x=1), "c": True})
    assert same(unflatten(encoded, {}), {"a": 0.1, "b": {"x": 1}, "c": True})


def test_parameters_and_conjugates_become_plain_tensors():
    z = torch.tensor([1 + 2j])
    _, table = flatten({"p": torch.nn.Parameter(torch.ones(2)), "z": z.conj(), "i": z.conj().imag})
    assert type(table["p"]) is torch.Tensor and not table["p"].requires_grad
    assert not table["z"].is_conj() and table["z"].item() == 1 - 2j
    assert not table["i"].is_neg() and table["i"].item() == -2


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"methods": {"ema": {"n": np.int64(3)}}}, "methods.ema.n: is a int64, expected None, bool"),
        ({"a": [1, {2, 3}]}, "a.1: is a set"),
        ({"a": b"x"}, "a: is a bytes"),
        ({"a": {(1, 2): 3}}, r"a: has the key \(1, 2\)"),
        (object(), "root: is a object"),
        ({"a": torch.ones(2).to_sparse()}, "a: is a torch.sparse_coo tensor"),
        ({"a": torch.ones(2, device="meta")}, "a: is a meta tensor"),
        ({"a": torch.nn.UninitializedParameter()}, "a: is a UninitializedParameter, expected a plain tensor"),
    ],
)
def test_what_cannot_be_saved_is_refused_with_its_place(state, message):
    with pytest.raises(CheckpointError, match=message):
        flatten(state)
