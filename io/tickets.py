"""What a read looks like from outside: its priority, its life, and the queue's counters."""

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from queue import SimpleQueue

from tierrun.io.errors import TierrunError
from tierrun.io.store import ExpertKey


class Priority(IntEnum):
    """Lower is served first."""

    DEMAND = 0
    LOOKAHEAD = 1
    BACKGROUND = 2


class State(Enum):
    """A ticket's life: queued, reading, then one of the last three for good."""

    QUEUED = "queued"
    READING = "reading"
    DONE = "done"
    FAILED = "failed"
    DROPPED = "dropped"


@dataclass(eq=False, slots=True)
class Ticket:
    """One read of one expert into `into`. Everything after `into` is the queue's to set."""

    key: ExpertKey
    into: memoryview
    priority: Priority
    state: State = State.QUEUED
    error: TierrunError | None = None
    next_part: int = 0
    parts_in_flight: int = 0
    unwanted: bool = False
    listeners: list["SimpleQueue[Ticket]"] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.state in (State.DONE, State.FAILED, State.DROPPED)


@dataclass(slots=True)
class QueueFigures:
    """What a queue has done since it was made.

    `record_seconds` ÷ `busy_seconds` is the mean number of records in flight while any was.
    """

    records: int = 0
    nbytes: int = 0
    retries: int = 0
    dropped: int = 0
    busy_seconds: float = 0.0
    record_seconds: float = 0.0

    @property
    def mean_depth(self) -> float:
        return self.record_seconds / self.busy_seconds if self.busy_seconds else 0.0
