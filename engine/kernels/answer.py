# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The host's part of a decode layer as compiled code: read the letter, and begin what the CPU has.

Between a letter and the next graph the GPU has little or nothing to do, so every microsecond here
is one of the token's. Where the device needs nothing of the host, the letter is only noted down, in
a journal; where the CPU has a part, its threads begin at once. What is absent is left to Python.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tierrun.engine.kernels.host_job import JOB_WORDS, RECORDS, arrange
from tierrun.engine.kernels.int8_tasks import prepare
from tierrun.engine.kernels.jit import njit
from tierrun.engine.kernels.native import load_atomic, nanoseconds, pause, store_atomic, word
from tierrun.engine.kernels.workers import begin, finish

NOT_YET, COMPUTED, ABSENT, SHARED = -1, 1, 2, 4
"""What `answer` returns: no letter; else bits: the CPU has a part, some are absent, and (with the
first only) the device reads some in RAM as well."""

LOOKS = 1 << 14
"""At the flag before Python may see whether the device is lost, or a key was pressed: 1 ms."""

_HEAD = 1
_IN_PLACE, _FOR_HOST, _KIND = 2, 3, 7


class Journal(NamedTuple):
    """What letters said: experts over all layers, and their entries; `filled` [1] of each."""

    experts: NDArray[np.int64]
    entries: NDArray[np.int64]
    filled: NDArray[np.int64]


class LaneArrays(NamedTuple):
    """The CPU lane's memory for one layer's geometry; see `host_job` for `job` and `table`.

    `numbers` [A] gets, of each assignment, the row of its result + 1, or 0; `log` [layers, 3] when
    the CPU began and ended in each layer, in ns of the monotonic clock, and with how many records
    (0: it had no part since that was last looked at).
    """

    state: int
    perform: int
    job: NDArray[np.int64]
    table: NDArray[np.int64]
    numbers: NDArray[np.int64]
    records: NDArray[np.int64]
    tokens: NDArray[np.int64]
    which: NDArray[np.int64]
    log: NDArray[np.int64]
    tasks_per_record: int


def no_lane() -> LaneArrays:
    """Where the CPU has no part."""
    empty = np.zeros(1, np.int64)
    return LaneArrays(
        0, 0, np.zeros(JOB_WORDS, np.int64), *(empty,) * 5, np.zeros((1, 3), np.int64), 0
    )


_WORDS = "int64[::1]"
_JOURNAL = ",".join((_WORDS,) * 3)
_LANE = ",".join(("int64", "int64", *(_WORDS,) * 6, "int64[:, ::1]", "int64"))


@njit(f"void(int64, int64, int64, int64, int64, {_WORDS}, {_LANE})", nogil=True, cache=True)
def _begin(
    box, layer, count, top_k, first, addresses,
    state, perform, job, table, numbers, records, tokens, which, log, tasks_per_record,
):  # fmt: skip
    """Let the threads begin with what is left to the CPU; one record for all who want it."""
    log[layer, 0] = nanoseconds()
    used, mine = 0, 0
    for i in range(count):
        numbers[i] = 0
        if word(box + 8 * (_HEAD + count + i)) & _KIND == _FOR_HOST:
            address = addresses[first + word(box + 8 * (_HEAD + i))]
            record = 0
            while record < used and records[record] != address:
                record += 1
            records[record] = address
            used = max(used, record + 1)
            tokens[mine], which[mine] = i // top_k, record
            mine += 1
            numbers[i] = mine
    arrange(records[:used], tokens[:mine], count // top_k, which[:mine], table)
    prepare(job.ctypes.data, count // top_k)
    job[RECORDS // 8] = log[layer, 2] = used
    begin(state, perform, job.ctypes.data, used * tasks_per_record)


@njit(
    f"int64(int64, int64, int64, int64, int64, {_WORDS}, {_JOURNAL}, {_LANE})",
    nogil=True,
    cache=True,
)
def answer(
    box, layer, count, top_k, first, addresses,
    experts, entries, filled,
    state, perform, job, table, numbers, records, tokens, which, log, tasks_per_record,
):  # fmt: skip
    """Wait for a letter and do what can be done here; see `NOT_YET`.

    `box` is the address of the mailbox of `layer`, for `count` assignments, `top_k` of them per
    token; `first` the number of the layer's first expert; `addresses` where in RAM the experts
    (over all) are. The rest is a `Journal` and `LaneArrays`. Unless something is absent, the letter
    is in the journal and the CPU's part is done; else that is under way and must be finished.
    """
    looks = 0
    while load_atomic(box) == 0:
        looks += 1
        if looks == LOOKS:
            return NOT_YET
        pause()
    store_atomic(box, 0)
    some, absent, shared = False, False, False
    for i in range(count):
        kind = word(box + 8 * (_HEAD + count + i)) & _KIND
        some |= kind == _FOR_HOST
        absent |= kind == _KIND
        shared |= kind == _IN_PLACE
    some &= state != 0
    if some:
        _begin(
            box, layer, count, top_k, first, addresses,
            state, perform, job, table, numbers, records, tokens, which, log, tasks_per_record,
        )  # fmt: skip
    if absent:
        return ABSENT | COMPUTED if some else ABSENT
    place = filled[0]
    if place + count > len(experts):
        raise OverflowError("the journal of letters is never read")
    for i in range(count):
        experts[place + i] = first + word(box + 8 * (_HEAD + i))
        entries[place + i] = word(box + 8 * (_HEAD + count + i))
    filled[0] = place + count
    if some:
        finish(state)
        log[layer, 1] = nanoseconds()
        return COMPUTED | SHARED if shared else COMPUTED
    return 0
