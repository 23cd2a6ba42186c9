"""Measurements of live memory walk over every object; those of the libraries are put out of their way first."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def _libraries_out_of_the_way() -> None:
    import torch._dynamo  # noqa: F401 - the first use of an optimizer imports it


    gc.collect()
    gc.freeze()
