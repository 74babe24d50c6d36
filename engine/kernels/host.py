"""A layer's experts on the CPU: compiled products of records where they lie.

Weights are unpacked in registers; nothing is expanded, copied or allocated. Activations are fp32,
or int8 by blocks of 32 (`int8_rows`), which is two to four times as fast; sums are fp32. Compiled
by numba for the machine at hand and kept on disk: fp32 for one layout at a time, int8 for a codec.
"""

import os
import platform
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from tierrun.engine.gpu.layout import ExpertLayout
from tierrun.engine.kernels.geometry import COLUMNS, ROWS
from tierrun.engine.kernels.int8 import FEW_TOKENS, obstacle
from tierrun.io.extent import align_up

if TYPE_CHECKING:
    from tierrun.engine.kernels.answer import LaneArrays
    from tierrun.engine.kernels.host_tasks import Tasks
    from tierrun.engine.kernels.workers import Workers

_MACHINES = ("x86_64", "aarch64")
_ALIGNMENT = 64
"""Of records, in bytes."""


def supported(layout: ExpertLayout) -> str | None:
    """None if `HostExperts` can compute records of `layout`; or why not, in one line."""
    if len(layout.first) != 1:
        return "gate and up are in different codecs"
    if layout.gate.kind == "none":
        return "the module applies an activation of its own"
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return f"there are no compiled kernels for {sys.platform} on {platform.machine()}"
    return None


def supports_int8(layout: ExpertLayout) -> bool:
    """Whether there are int8 kernels for both products of a `supported` layout."""
    return all(obstacle(operand.matrix) is None for operand in (*layout.first, layout.down))


class HostExperts:
    """The MLP of one experts layer's records on the CPU; compiled for `layout`'s geometries.

    One call at a time. Its threads are shared by all layers that ask for as many.
    """

    def __init__(self, layout: ExpertLayout, threads: int, *, int8: bool = False) -> None:
        """`threads`, the caller's among them; no more than the process has cores.

        With `int8` activations are quantised, where the layout `supports_int8`.

        Raises:
            ValueError: a layout that is not `supported`.
        """
        if (reason := supported(layout)) is not None:
            raise ValueError(reason)
        # numba takes a second to import: only whoever wants kernels waits for it
        from tierrun.engine.kernels import (
            host_job,
            host_tasks,
            int8_many,
            int8_rows,
            int8_tasks,
            workers,
        )

        (first,), down = layout.first, layout.down
        self._hidden, self._inner = first.matrix[COLUMNS], down.matrix[COLUMNS]
        self._outer = down.matrix[ROWS]
        assert first.matrix[ROWS] == 2 * self._inner
        self._plan: int8_tasks.Plan | None = None
        if int8 and supports_int8(layout):
            self._plan = int8_tasks.Plan(first, down, layout.gate)
            self._tasks = int8_tasks.tasks(self._inner, self._outer)
            self._many_tasks = int8_many.tasks(self._inner, self._outer)
            self._row_words = int8_rows.row_bytes(self._hidden) // 8
        else:
            self._tasks = host_tasks.tasks(first, down, layout.gate)
            self._row_words = 0
        # bytes from one row between the products to the next: fp32, or blocks, which are smaller
        self._stride = align_up(4 * align_up(self._inner, int8_rows.BLOCK), _ALIGNMENT)
        self._host, self._panels = host_job, int8_many
        self._prepare, self._prepare_rows = int8_tasks.prepare, int8_tasks.prepare_rows
        self._panel = int8_rows.PANEL
        self._panel_words = int8_rows.panel_bytes(self._hidden) // 8
        self._inner_panel = int8_rows.panel_bytes(self._inner)
        self._workers = workers.workers(max(1, min(threads, _cores())))
        self._table = self._inners = self._rows = np.empty(0, np.int64)
        self._job = np.zeros(host_job.JOB_WORDS, np.int64)
        self._perform = host_job.perform().address
        self._kept: list[object] = []

    def compute(
        self,
        records: Sequence[torch.Tensor],
        hidden: NDArray[np.float32],
        tokens: NDArray[np.int64],
        which: NDArray[np.int64],
        out: NDArray[np.float32],
    ) -> None:
        """See `begin`, with records as uint8 tensors; returns when all is done."""
        addresses = np.array([record.data_ptr() for record in records], np.int64)
        self.begin(addresses, hidden, tokens, which, out)
        self.finish()

    def begin(
        self,
        addresses: NDArray[np.int64],
        hidden: NDArray[np.float32],
        tokens: NDArray[np.int64],
        which: NDArray[np.int64],
        out: NDArray[np.float32],
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        """Apply record `which[a]` to `hidden[tokens[a]]` into `out[rows[a]]`, unweighted.

        `addresses` are those of experts' records in host memory (as in a slot, 64-byte aligned),
        int64; `hidden` is [T, H]; without `rows`, row a of `out` is the result of assignment a. A
        row of `out` depends on its record and its row of `hidden` only: whatever else is computed,
        and by how many threads, the bits are the same. The caller's thread goes on at once;
        `finish` must follow.

        Raises:
            IndexError: an assignment is of no record, or of no token.
        """
        assert hidden.shape[1] == self._hidden and out.shape[1] == self._outer
        assert hidden.flags.c_contiguous and out.flags.c_contiguous
        assert hidden.dtype == out.dtype == np.float32 and len(tokens) == len(which)
        assert not (addresses % _ALIGNMENT).any()
        if rows is None:
            rows = which[:0]
            assert len(out) == len(which)
        # unpacking a whole panel's worth for a few tokens of each expert takes longer than it saves
        many = self._plan is not None and len(which) > FEW_TOKENS * len(addresses)
        if self._plan is not None and not many and len(hidden) > len(which) > 0:
            hidden, tokens = _used(hidden, tokens)
        most = self._panel if many else len(which) + 1
        self._table = _room(self._table, self._table_words(len(addresses), len(which), most))
        given = addresses, tokens, len(hidden), which, rows, most, self._table
        if (used := self._host.arrange_parts(*given)) < 0:
            raise IndexError(f"no such record among {len(addresses)}, or token among {len(hidden)}")
        tasks = self._many_tasks if many else self._tasks
        self._fill(used, hidden, out, len(which), many=many)
        job = self._job.ctypes.data
        if many:
            self._workers.run(self._panels.prepare().address, job, used * self._panels.SLICES)
        elif self._plan is not None and len(hidden) <= FEW_TOKENS:
            self._prepare(job, len(hidden))
        elif self._plan is not None:
            self._workers.run(self._prepare_rows().address, job, len(hidden))
        self._workers.begin(self._perform, job, used * (tasks.first_tasks + tasks.down_tasks))

    def finish(self) -> bool:
        """Help with what is left, and wait until all is done; whether anything was left.

        The other threads compute meanwhile; everything given to `begin` stays as it is until now.
        """
        return self._workers.finish()

    def lane(
        self,
        hidden: NDArray[np.float32],
        out: NDArray[np.float32],
        numbers: NDArray[np.int64],
        log: NDArray[np.int64],
    ) -> "LaneArrays":
        """For `answer`, which computes from rows of `hidden` into rows of `out` [A, H].

        Of the layers of one geometry; its memory is kept by what is returned and by this object.
        """
        from tierrun.engine.kernels.answer import LaneArrays

        most, found = len(out), self._tasks
        table = np.zeros(self._table_words(most, most, most), np.int64)
        inners = np.zeros(most * self._stride // 8, np.int64)
        rows = np.zeros(len(hidden) * self._row_words, np.int64)
        words = self._words(found, 0, hidden, out, inners, self._stride, table, rows)
        job = np.array(words, np.int64)
        self._kept += [hidden, out, inners, rows, table, job]
        return LaneArrays(
            self._workers.state,
            self._perform,
            job,
            table,
            numbers,
            np.zeros(most, np.int64),
            np.zeros(most, np.int64),
            np.zeros(most, np.int64),
            log,
            found.first_tasks + found.down_tasks,
        )

    @property
    def widths(self) -> tuple[int, int]:
        """Of a row of `hidden`, and of one of `out`."""
        return self._hidden, self._outer

    @property
    def workers(self) -> "Workers":
        """Its threads."""
        return self._workers

    def _fill(
        self,
        used: int,
        hidden: NDArray[np.float32],
        out: NDArray[np.float32],
        assignments: int,
        *,
        many: bool,
    ) -> None:
        """Make the job one of `used` rows of the table, and room for what it needs."""
        tasks, stride = self._tasks, self._stride
        places, row_places, row_words = assignments, len(hidden), self._row_words
        if many:
            tasks, stride = self._many_tasks, self._inner_panel
            places, row_places, row_words = used, used, self._panel_words
        self._inners = _room(self._inners, places * stride // 8)
        self._rows = _room(self._rows, row_places * row_words)
        self._job[:] = self._words(
            tasks, used, hidden, out, self._inners, stride, self._table, self._rows
        )

    def _words(
        self,
        found: "Tasks",
        used: int,
        hidden: NDArray[np.float32],
        out: NDArray[np.float32],
        inners: NDArray[np.int64],
        stride: int,
        table: NDArray[np.int64],
        rows: NDArray[np.int64],
    ) -> tuple[int, ...]:
        """The words of a job; see `host_job`."""
        given = hidden.ctypes.data
        plan, taken = (0, given) if self._plan is None else (self._plan.address, rows.ctypes.data)
        return (
            *(found.first, found.down, used, found.first_tasks, found.down_tasks),
            *(taken, out.ctypes.data, inners.ctypes.data, stride, table.ctypes.data),
            *(plan, given),
        )

    def _table_words(self, records: int, assignments: int, most: int) -> int:
        """Of a table of so many, with at most `most` assignments in a row."""
        return (records + assignments // most) * (self._host.TABLE_ROW // 8) + 2 * assignments


def _used(
    hidden: NDArray[np.float32], tokens: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The rows of `hidden` that are among `tokens`, and those of them that `tokens` are."""
    used, numbers = np.unique(tokens, return_inverse=True)
    if used[0] < 0 or used[-1] >= len(hidden):
        raise IndexError(f"no such token among {len(hidden)}")
    return hidden[used], numbers


def _room(memory: NDArray[np.int64], words: int) -> NDArray[np.int64]:
    """`memory`, or more if it has not so many words."""
    return memory if len(memory) >= words else np.empty(2 * words, np.int64)


def _cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0))
