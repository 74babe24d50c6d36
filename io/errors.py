"""Every error that a user or a disk can cause.

    TierrunError                 exit code 1: something failed
    ├── UsageError               exit code 2: asked for something that cannot be
    │   └── BudgetError          a budget too small; says the smallest that works
    ├── StoreError               a directory that is not a usable store
    │   ├── VersionError         written by a newer tierrun
    │   └── CorruptError         bytes differ from what the index promises
    ├── ReadError                the operating system failed a read, twice
    ├── CheckpointError          a source that cannot be converted
    ├── DiskFullError            a target without room; says needed and free
    ├── DeviceError              the GPU is absent, too old, lost, or out of memory
    └── ModelError               an architecture that cannot be run

Messages say what was wrong, where, and what to do about it, in one line.
"""


class TierrunError(Exception):
    """Base of all; the command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(TierrunError):
    """The request itself is wrong."""

    exit_code = 2


class BudgetError(UsageError):
    """A tier's budget cannot hold what one layer needs."""


class StoreError(TierrunError):
    """Not a store, or one with parts missing."""


class VersionError(StoreError):
    """The store's format is newer than this tierrun."""


class CorruptError(StoreError):
    """Truncated file or checksum mismatch."""


class ReadError(TierrunError):
    """A read failed and failed again on retry."""

    def __init__(self, shard: str, layer: int, expert: int, errno: int, reason: str) -> None:
        super().__init__(
            f"reading {shard} failed twice: layer {layer}, expert {expert}, "
            f"errno {errno} ({reason})"
        )
        self.shard, self.layer, self.expert, self.errno = shard, layer, expert, errno


class CheckpointError(TierrunError):
    """The source checkpoint is incomplete, dense, or of an unsupported kind."""


class DiskFullError(TierrunError):
    """The target directory has no room; what was written stays and is continued."""


class DeviceError(TierrunError):
    """The compute device cannot be used, or stopped working; the store is untouched."""


class ModelError(TierrunError):
    """transformers cannot build this architecture, or tierrun cannot stream it."""
