"""A reader with another behind it, for when it breaks."""

import logging
from typing import Protocol

from tierrun.io.reader import Reader

log = logging.getLogger(__name__)


class Named(Protocol):
    """What has a name to be spoken of."""

    name: str


class Switch:
    """Whether the spare is in use; thrown once, and said once."""

    def __init__(self, first: Named, spare: Named) -> None:
        self._first, self._spare = first, spare
        self.thrown = False

    def throw(self, error: OSError) -> None:
        """`first` failed with `error` at what `spare` could read."""
        if not self.thrown:
            self.thrown = True
            log.warning(
                "%s failed in mid-run (%s): %s reads from here on",
                self._first.name,
                error.strerror or error,
                self._spare.name,
            )


class SparedReader:
    """Reads with `first`, and again with `spare` what it fails at; see `Reader`.

    A read that `spare` can do says that `first` is broken: from then on `spare` reads everything.
    One at which both fail says nothing about `first`; the error is that of `spare`.
    """

    def __init__(self, first: Reader, spare: Reader) -> None:
        self._first, self._spare = first, spare
        self._switch = Switch(first, spare)
        self.name = first.name

    def read(self, shard: int, offset: int, into: memoryview) -> None:
        if self._switch.thrown:
            self._spare.read(shard, offset, into)
            return
        try:
            self._first.read(shard, offset, into)
        except OSError as error:
            self._spare.read(shard, offset, into)
            self._switch.throw(error)
            self.name = f"{self._first.name}, then {self._spare.name}"

    def close(self) -> None:
        self._first.close()
        self._spare.close()
