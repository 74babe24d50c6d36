"""What a prompt frees is kept for its next operation."""

import subprocess
import sys

PROGRAM = """
import resource
import torch
from tierrun.engine.host.heap import keep_heap

keep_heap()
for round in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2 << 20)  # 8 MiB: 2048 pages
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_is_touched_for_the_first_time_once() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, *later = map(int, done.stdout.split())
    assert max(later) < 2048, "the pages of one block, of twenty"
