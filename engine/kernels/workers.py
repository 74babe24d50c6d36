# mypy: disable-error-code="untyped-decorator, no-any-return"
"""Threads that wait for work in compiled code: a call begins and ends within microseconds.

A job is a number of tasks, numbered, that threads take one after another; the caller takes them,
too. No thread must come: what the others have not begun when the caller is through it has done
itself. So a sleeping, busy or missing worker costs speed, never an answer. A thread takes several
tasks that follow one another, fewer as the end comes near (guided self-scheduling, Polychronopoulos
and Kuck 1987): what it prefetches behind one task's weights is its next task's.

Guarantees: when `finish` returns every task has ended, its writes are seen, and no worker looks at
the job any more.
Assumes: one caller at a time (a lock holds it); atomics in one order for all (`seq_cst`). A worker
counts itself as ACTIVE, and only then looks whether the job is OPEN; the caller closes the job and
only then waits for ACTIVE to be 0. So either the worker sees it closed, or the caller sees the
worker.
"""

import threading
import weakref

import numpy as np
from numpy.typing import NDArray

from tierrun.engine.kernels.jit import njit
from tierrun.engine.kernels.native import (
    add_atomic,
    call,
    give_way,
    load_atomic,
    pause,
    put_word,
    sleep_while,
    store_atomic,
    wake,
    word,
)

OPEN, NEXT, ACTIVE, SLEEPERS, JOB = 0, 128, 256, 384, 512
"""Bytes into the state, a pair of cache lines each. OPEN is the number of the job that has tasks,
0 between jobs, or STOP. At JOB: function, argument, tasks, number of the last job; parts that what
is left is cut into, of which a thread takes one."""
STATE_BYTES = 640
_SHARES = 2
"""Parts for each thread."""
STOP = -1

SPINS = 1 << 14
"""Looks at OPEN before a worker sleeps, some 200 µs to 1 ms: more than lies between two layers."""
PATIENCE = 1 << 10
"""Looks before a waiting thread offers its core to others."""


class Workers:
    """`threads` threads, of which the caller's is one; the others end with this object."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._memory = np.zeros(STATE_BYTES // 8 + 16, np.int64)
        state = -(-self._memory.ctypes.data // 128) * 128
        self._state = state
        self._memory[(state - self._memory.ctypes.data + JOB + 32) // 8] = _SHARES * threads
        self._lock = threading.Lock()
        others = [_thread(number, state, self._memory) for number in range(1, threads)]
        weakref.finalize(self, _end, state, self._memory, others)

    def run(self, function: int, argument: int, tasks: int) -> None:
        """Call `function(argument, task)` (the address of a C function of two int64) for each task.

        Tasks are begun in their order; the GIL is released.
        """
        self.begin(function, argument, tasks)
        self.finish()

    def begin(self, function: int, argument: int, tasks: int) -> None:
        """Let the other threads begin; `finish` must follow."""
        self._lock.acquire()
        begin(self._state, function, argument, tasks)

    def finish(self) -> bool:
        """Do what nobody has begun, and wait for the rest; whether there was anything left."""
        left = load_left(self._state)
        finish(self._state)
        self._lock.release()
        return left

    @property
    def state(self) -> int:
        """For compiled code that calls `begin` and `finish` itself, while it is claimed."""
        return self._state

    def claim(self) -> None:
        """Be the one caller; `release`, or `finish` if a job is open then, must follow."""
        self._lock.acquire()

    def try_claim(self) -> bool:
        """`claim`, unless somebody else is the one caller; whether it worked."""
        return self._lock.acquire(blocking=False)

    def release(self) -> None:
        """No job is open."""
        self._lock.release()


_shared: weakref.WeakValueDictionary[int, Workers] = weakref.WeakValueDictionary()


def workers(threads: int) -> Workers:
    """The `threads` threads that all who ask for as many share, until the last of them is gone."""
    found = _shared.get(threads)
    if found is None:
        found = _shared[threads] = Workers(threads)
    return found


def _thread(number: int, state: int, memory: NDArray[np.int64]) -> threading.Thread:
    """A worker, started; a daemon, as it is `_end` that ends it when the process does."""
    made = threading.Thread(
        target=_work, args=(state, memory), name=f"tierrun-cpu-{number}", daemon=True
    )
    made.start()
    return made


def _work(state: int, memory: NDArray[np.int64]) -> None:
    """A worker's life; it keeps the state's `memory`."""
    serve(state, SPINS)


def _end(state: int, memory: NDArray[np.int64], others: list[threading.Thread]) -> None:
    stop(state)
    for thread in others:
        thread.join()


@njit("void(int64)", nogil=True, cache=True)
def rest(looks: int) -> None:
    """Between two looks at something that a running thread will change."""
    if looks % PATIENCE:
        pause()
    else:
        give_way()


@njit("int64(int64, int64, int64)", nogil=True, cache=True)
def _await(state: int, seen: int, spins: int) -> int:
    """The number of a job other than `seen`, or STOP."""
    looks = 0
    while True:
        found = load_atomic(state + OPEN)
        if found != 0 and found != seen:
            return found
        looks += 1
        if looks < spins:
            pause()
        else:
            add_atomic(state + SLEEPERS, 1)
            sleep_while(state + OPEN, found)
            add_atomic(state + SLEEPERS, -1)
            looks = 0


@njit("void(int64)", nogil=True, cache=True)
def _take(state: int) -> None:
    function, argument = word(state + JOB), word(state + JOB + 8)
    tasks, shares = word(state + JOB + 16), word(state + JOB + 32)
    while True:
        some = max(1, (tasks - load_atomic(state + NEXT)) // shares)
        first = add_atomic(state + NEXT, some)
        if first >= tasks:
            return
        for task in range(first, min(first + some, tasks)):
            call(function, argument, task)


@njit("void(int64, int64)", nogil=True, cache=True)
def serve(state: int, spins: int) -> None:
    """Take tasks of one job after another until `stop`."""
    seen = 0
    while True:
        found = _await(state, seen, spins)
        if found == STOP:
            return
        seen = found
        add_atomic(state + ACTIVE, 1)
        if load_atomic(state + OPEN) == found:
            _take(state)
        add_atomic(state + ACTIVE, -1)


@njit("void(int64, int64, int64, int64)", nogil=True, cache=True)
def begin(state: int, function: int, argument: int, tasks: int) -> None:
    """See `Workers.begin`."""
    number = word(state + JOB + 24) % 0x7FFFFFFE + 1
    put_word(state + JOB, function)
    put_word(state + JOB + 8, argument)
    put_word(state + JOB + 16, tasks)
    put_word(state + JOB + 24, number)
    store_atomic(state + NEXT, 0)
    store_atomic(state + OPEN, number)
    if load_atomic(state + SLEEPERS) > 0:
        wake(state + OPEN)


@njit("bool_(int64)", nogil=True, cache=True)
def load_left(state: int) -> bool:
    """Whether a task of the open job has not been begun, or is under way."""
    begun = load_atomic(state + NEXT) >= word(state + JOB + 16)
    return not begun or load_atomic(state + ACTIVE) != 0


@njit("void(int64)", nogil=True, cache=True)
def finish(state: int) -> None:
    """See `Workers.finish`."""
    _take(state)
    store_atomic(state + OPEN, 0)
    looks = 0
    while load_atomic(state + ACTIVE) != 0:
        looks += 1
        rest(looks)


@njit("void(int64)", nogil=True, cache=True)
def stop(state: int) -> None:
    """End all workers, once they are through with what they do."""
    store_atomic(state + OPEN, STOP)
    wake(state + OPEN)
