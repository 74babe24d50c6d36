# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""One call's job as compiled code sees it: words and tables by address, and the order of its tasks.

Its tasks are, for each record in use, 32 rows of gate and up with their activation each, then, for
each record again, 32 rows of down each. A task of down waits for its record's first tasks only:
they are taken before it and wait for nothing, so there is no barrier, and no circle of waits.
"""

from functools import lru_cache
from typing import Any

from tierrun.engine.kernels.host_sums import TOGETHER
from tierrun.engine.kernels.jit import cfunc, njit
from tierrun.engine.kernels.native import add_atomic, call_three, load_atomic, put_word, word
from tierrun.engine.kernels.workers import rest

FIRST, DOWN, RECORDS, FIRST_TASKS, DOWN_TASKS = 0, 8, 16, 24, 32
HIDDEN, OUT, INNER, INNER_STRIDE = 40, 48, 56, 64
TABLE, PLAN, UNQUANTISED = 72, 80, 88
"""Bytes into a job: what computes a first task and one of down (addresses of C functions of job,
record and tile), how many there are; addresses of the activations [T, in], of the result [A, out]
and of scratch [A, inner], and the bytes of a row of that. At TABLE is the address of its tables.
Where activations are int8, PLAN is the address of what `int8_tasks` must know, HIDDEN and INNER are
rows of blocks (or panels, one for each row of the table, and INNER_STRIDE the bytes of one), and
UNQUANTISED is where the activations are; else both are 0."""
JOB_WORDS = 12

ADDRESS, BEGIN, END, DONE = 0, 8, 16, 64
TABLE_ROW = 128
"""Bytes into a record's row of the table: where it is, which of the sorted assignments are its own,
and (apart, as threads write it) how many of its first tasks are done. After all rows there are the
sorted assignments, a pair each: row of the result, token."""


@njit("int64(int64, int64)", cache=True)
def pair(job, place):
    """Where the sorted assignment number `place` is: itself, then its token."""
    return word(job + TABLE) + word(job + RECORDS) * TABLE_ROW + 16 * place


@njit("void(int64, int64, int64, int64, int64)", cache=True)
def find_hidden(job, start, count, row_bytes, inputs):
    """Put the addresses of activations for `count` assignments, the last one again, at `inputs`."""
    for i in range(TOGETHER):
        token = word(pair(job, start + min(i, count - 1)) + 8)
        put_word(inputs + 8 * i, word(job + HIDDEN) + row_bytes * token)


@njit("void(int64, int64, int64, int64)", cache=True)
def find_inner(job, start, count, inputs):
    """The same of what is between the two products."""
    for i in range(TOGETHER):
        row = (start + min(i, count - 1)) * word(job + INNER_STRIDE)
        put_word(inputs + 8 * i, word(job + INNER) + row)


def _perform(job, task):
    """Task number `task` of a job."""
    records, tiles = word(job + RECORDS), word(job + FIRST_TASKS)
    table = word(job + TABLE)
    if task < records * tiles:
        record = task // tiles
        call_three(word(job + FIRST), job, record, task % tiles)
        add_atomic(table + record * TABLE_ROW + DONE, 1)
        return
    task -= records * tiles
    record = task // word(job + DOWN_TASKS)
    looks = 0
    while load_atomic(table + record * TABLE_ROW + DONE) < tiles:
        looks += 1
        rest(looks)
    call_three(word(job + DOWN), job, record, task % word(job + DOWN_TASKS))


@lru_cache
def perform() -> Any:
    """What `workers` calls for a task: a C function of a job's address and a number."""
    return cfunc("void(int64, int64)", cache=True)(_perform)


@njit("int64(int64[::1], int64)", cache=True)
def _uses(which, record):
    """How many assignments are of a record."""
    count = 0
    for found in which:
        count += found == record
    return count


@njit(
    "int64(int64[::1], int64[::1], int64, int64[::1], int64[::1], int64, int64[::1])",
    nogil=True,
    cache=True,
)
def arrange_parts(addresses, tokens, most_tokens, which, rows, most, table):
    """As `arrange`, with a row of the table for each `most` assignments of a record.

    Results go to `rows`, one for each assignment, or in their order if that is empty.
    """
    for a in range(len(which)):
        if not (0 <= which[a] < len(addresses) and 0 <= tokens[a] < most_tokens):
            return -1
    used = 0
    for record in range(len(addresses)):
        used += (_uses(which, record) + most - 1) // most
    pairs, row, place = used * TABLE_ROW // 8, -TABLE_ROW // 8, 0
    for record in range(len(addresses)):
        count = 0
        for a in range(len(which)):
            if which[a] != record:
                continue
            if count % most == 0:
                row += TABLE_ROW // 8
                table[row + ADDRESS // 8], table[row + DONE // 8] = addresses[record], 0
                table[row + BEGIN // 8] = place
            table[pairs + 2 * place] = rows[a] if len(rows) else a
            table[pairs + 2 * place + 1] = tokens[a]
            count, place = count + 1, place + 1
            table[row + END // 8] = place
    return used


@njit("int64(int64[::1], int64[::1], int64, int64[::1], int64[::1])", nogil=True, cache=True)
def arrange(addresses, tokens, most_tokens, which, table):
    """Fill the `table` of records in use and of assignments by record; how many records are in use.

    Assignments of a record stay in their order. −1 where one is of a record or a token that there
    is not.
    """
    return arrange_parts(addresses, tokens, most_tokens, which, which[:0], len(which) + 1, table)
