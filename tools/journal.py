"""The journal of a conversion: which items are safely in the shards, for a run that is killed.

The first line names the plan, every other line is one finished item: `[index, "xxh3"]`. Lines are
appended only after the item's bytes were synced, so a line is a promise; a torn last line is an
item to be done again. The lock on the file keeps two conversions out of one directory.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path

from tierrun.io.errors import UsageError

JOURNAL = "convert.journal"


class Journal:
    """The locked journal of the conversion into `directory`."""

    def __init__(self, directory: Path) -> None:
        """Lock the journal, creating an empty one where there is none.

        Raises:
            UsageError: another process is converting into `directory`.
            OSError: the file cannot be made.
        """
        self.path = directory / JOURNAL
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._lock()
        except UsageError:
            os.close(self._descriptor)
            raise

    def _lock(self) -> None:
        """Guarantees: of all processes at most one holds the journal that `path` names.

        A journal unlinked between our open and our lock was a conversion that just finished.
        """
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"another conversion is writing to {self.path.parent}; wait for it to end"
            ) from None
        if os.fstat(self._descriptor).st_nlink == 0:
            raise UsageError(f"another conversion into {self.path.parent} just ended; try again")

    @property
    def is_empty(self) -> bool:
        """Whether no conversion was begun."""
        return os.fstat(self._descriptor).st_size == 0

    def clear(self) -> None:
        """Forget the conversion that was begun."""
        os.ftruncate(self._descriptor, 0)

    def resume(self, plan: str) -> dict[int, int]:
        """The finished items of `plan` (index → checksum); begins it where none was begun.

        Raises:
            UsageError: the journal is of another plan, or damaged.
        """
        size = os.fstat(self._descriptor).st_size
        lines = os.pread(self._descriptor, size, 0).split(b"\n")[:-1]
        first = json.dumps({"plan": plan}).encode()
        if lines and lines[0] != first:
            raise UsageError(
                f"{self.path.parent} holds an unfinished conversion of something else; finish "
                "that one, choose another directory, or use --force to start over"
            )
        # Cut off what is torn, so that the next line does not continue it.
        end = sum(len(line) + 1 for line in lines)
        os.ftruncate(self._descriptor, end)
        os.lseek(self._descriptor, end, os.SEEK_SET)
        if not lines:
            self._append(first + b"\n")
        return dict(map(self._parse, lines[1:]))

    def commit(self, items: Mapping[int, int]) -> None:
        """Promise that `items` (index → checksum) are in the shards, durably."""
        lines = (f'[{index}, "{checksum:016x}"]\n' for index, checksum in items.items())
        self._append("".join(lines).encode())

    def remove(self) -> None:
        """Nothing is left to continue."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the lock up; a journal in which nothing was begun leaves no trace."""
        if self.is_empty:
            self.remove()
        os.close(self._descriptor)

    def _append(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fdatasync(self._descriptor)

    def _parse(self, line: bytes) -> tuple[int, int]:
        try:
            index, checksum = json.loads(line)
            return int(index), int(checksum, 16)
        except (ValueError, TypeError):
            raise UsageError(f"{self.path} is damaged; use --force to start over") from None
