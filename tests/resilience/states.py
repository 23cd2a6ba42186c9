"""Nested states for tests: what a checkpoint may hold, and when two are equal to the last bit."""

import struct

import numpy as np
import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int8, torch.int64, torch.bool,
          torch.complex64, torch.float8_e4m3fn, torch.uint16]  # fmt: skip


def same(a, b):
    """Equal in type, order, structure and every bit (nan's sign and payload in floats excepted)."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a.items(), b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (a != a and b != b)
    return a == b


def _tensor(dtype, shape, seed):
    data = np.random.default_rng(seed).integers(0, 256, size=(*shape, dtype.itemsize), dtype=np.uint8)
    if dtype is torch.bool:
        data &= 1
    return torch.from_numpy(data).view(dtype)[..., 0] if data.size else torch.empty(shape, dtype=dtype)


tensors = st.builds(
    _tensor,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(0, 2**32 - 1),
)
text = st.text(st.characters(), max_size=6)  # any code point, lone surrogates too
names = st.one_of(text, st.sampled_from(["", ".", "a.b", "a", "b", "$tensor", "$", "0", "a~2"]))
plain = st.one_of(st.none(), st.booleans(), st.integers(), st.integers(10**590, 10**620), st.floats(), names)
states = st.recursive(
    st.one_of(plain, tensors),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(names, inner, max_size=4),
        st.dictionaries(st.one_of(st.integers(), st.none(), names), inner, max_size=3),
    ),
    max_leaves=12,
)
