"""Measurements of live memory walk over every object; those of the libraries are put out of their way first."""

from __future__ import annotations

import gc
import importlib

import pytest


@pytest.fixture(scope="session", autouse=True)
def _libraries_out_of_the_way() -> None:
    for name in ("torch._dynamo", "headway.core.build", "headway.workloads.language"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
