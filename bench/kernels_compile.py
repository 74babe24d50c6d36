"""Kernels of a GPU compiled by several processes at once, into Triton's cache on disk."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from tierrun.bench.kernels_gpu import gpu_calls
from tierrun.bench.kernels_layers import fill, make_record
from tierrun.bench.kernels_plan import Case

_MOST_PROCESSES = 16


def compile_all(cases: Sequence[Case]) -> dict[Case, str]:
    """Compile what `cases` need; of those that fail, why, in one line."""
    processes = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)) - 1, len(cases))
    reasons = list(map(compile_one, cases) if processes < 2 else _by_processes(cases, processes))
    return {case: why for case, why in zip(cases, reasons, strict=True) if why is not None}


def _by_processes(cases: Sequence[Case], processes: int) -> list[str | None]:
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        try:
            return list(pool.map(compile_one, cases))
        except BaseException:  # told to end, for example
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def compile_one(case: Case) -> str | None:
    """Run `case` once with a single record; why that failed."""
    try:
        record = make_record(case.layer, case.codec)
        memory = torch.empty(len(record.data), dtype=torch.uint8, device=case.device)
        with torch.cuda.device(memory.device):
            calls, _ = gpu_calls(record, fill(memory, record), case.tokens)
            calls(0)
            torch.cuda.synchronize()
    except Exception as error:  # of Triton's, LLVM's or the device's: any
        first = (str(error).strip() or "no reason given").splitlines()[0]
        return f"{type(error).__name__}: {first}"
    return None
