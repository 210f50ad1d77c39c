"""Memory that a process keeps between iterations, in a process of its own."""

import platform
import subprocess
import sys

import pytest

PAGES = """
import resource, sys, torch
from sid_ray.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        a, b = torch.ones(10_000_000), torch.ones(15_000_000)
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    keep_freed_memory()
faults()
print(faults())
"""


def page_faults(how: str) -> int:
    """Pages that the system hands out while 100 MB are taken and freed five times, after once to warm up."""
    return int(subprocess.run([sys.executable, "-c", PAGES, how], check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    assert page_faults("keep") < 100
    assert page_faults("give back") > 1000
