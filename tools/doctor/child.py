"""Looking at CUDA from a process of its own: what hangs, crashes or poisons it, does so there."""

import subprocess
import sys
from threading import Lock
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

from pydantic import ValidationError

from tierrun.tools.doctor.facts import Facts

F = TypeVar("F", bound=Facts)

_KILLED_SECONDS = 1.0
"""To wait for a process that was killed; one that waits for a broken driver does not even then."""


class Answer(NamedTuple, Generic[F]):
    """The last facts that a child printed, and what kept it from more (empty: nothing)."""

    facts: F | None
    problem: str


class Child(Generic[F]):
    """`python -m module`, which prints what it knows as JSON on a line, again whenever it knows
    more. It runs from now on, for `seconds` at most."""

    def __init__(self, module: str, kind: type[F], seconds: float) -> None:
        self._kind, self._seconds = kind, seconds
        self._answer: Answer[F] | None = None
        self._lock = Lock()
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = _start(module)
        except OSError as error:  # no more processes, no more memory
            self._answer = Answer(None, f"no process could be started: {error.strerror or error}")

    def __enter__(self) -> "Child[F]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
        self.answer()

    def answer(self) -> Answer[F]:
        """Wait for the child's end, or its time's; safe to call from several threads."""
        with self._lock:
            if self._answer is None:
                assert self._process is not None
                output, problem = _wait(self._process, self._seconds)
                self._answer = Answer(_last(output, self._kind), problem)
            return self._answer


def _start(module: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _wait(process: "subprocess.Popen[str]", seconds: float) -> tuple[str, str]:
    """What the process prints, and what is wrong with it; ends it after `seconds`."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return _rest(process), f"no answer within {seconds:.0f} s (a cold disk? try again)"
    said = (errors.strip().splitlines() or ["without a word"])[-1]
    code = process.returncode
    return output, "" if code == 0 else f"the examination ended with code {code}: {said}"


def _rest(process: "subprocess.Popen[str]") -> str:
    """What a process that was killed has printed."""
    try:
        return process.communicate(timeout=_KILLED_SECONDS)[0]
    except subprocess.TimeoutExpired:
        return ""


def _last(output: str, kind: type[F]) -> F | None:
    """The last line of `output` that is a document of `kind`."""
    for line in reversed(output.splitlines()):
        try:
            return kind.model_validate_json(line)
        except ValidationError:
            continue
    return None
