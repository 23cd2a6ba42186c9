"""Freed memory is kept: counted page faults of making the same tensor again. Needs glibc: pytest tests/core."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from headway.core.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
def once():
    torch.ones(24 * 2**20)  # 96 MiB
for _ in range(20):  # glibc may cut some neighbours before it finds that an old one fits
    once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_the_pages_of_a_tensor_are_faulted_in_once():
    def run(mode: str) -> list[str]:
        command = [sys.executable, "-c", COUNT, mode]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    supported, kept = run("keep")
    if supported == "False":
        pytest.skip("not glibc")
    (plain,) = run("plain")
    assert int(kept) < int(plain) / 20
