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
    kept, given_back = page_faults("keep"), page_faults("give back")
    assert kept < 100
    assert given_back > 10 * max(kept, 10)  # not many where pages are huge ones always
