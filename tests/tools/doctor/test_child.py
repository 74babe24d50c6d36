"""Children: what they printed counts, however they end."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tools.doctor.trees import plant

from tierrun.tools.doctor.child import Answer, Child
from tierrun.tools.doctor.facts import Imports

FACTS = Imports(numba=None, triton="no triton")

Ask = Callable[..., Answer[Imports]]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """The answer of a child that runs `code`."""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)

    def ask(code: str, seconds: float = 20.0) -> Answer[Imports]:
        plant(tmp_path, {"patient.py": code})
        with Child("patient", Imports, seconds) as child:
            assert child.answer() is child.answer()
            return child.answer()

    return ask


SAY = f"print({FACTS.model_dump_json()!r}, flush=True)\n"


def test_the_last_facts_count(ask: Ask) -> None:
    older = FACTS.model_copy(update={"triton": "older"}).model_dump_json()
    code = f"print({older!r})\nprint('a library says hello')\n{SAY}print('[1, 2]')\n"
    assert ask(code) == (FACTS, "")


def test_what_was_said_before_a_hang_counts(ask: Ask) -> None:
    started = time.monotonic()
    answer = ask(f"{SAY}import time\ntime.sleep(60)\n", 3.0)
    assert answer.facts == FACTS
    assert answer.problem.startswith("no answer within 3 s")
    assert time.monotonic() - started < 10


def test_what_was_said_before_a_crash_counts(ask: Ask) -> None:
    facts, problem = ask(f"{SAY}import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    assert facts == FACTS and "code -11" in problem


def test_an_exception_is_named(ask: Ask) -> None:
    answer = ask("raise ValueError('like this')\n")
    assert answer == (None, "the examination ended with code 1: ValueError: like this")


def test_a_child_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with Child("patient", Imports, 1.0) as child:
        assert child.answer().facts is None and "no process could be" in child.answer().problem


def test_a_child_that_nobody_asked_is_ended(ask: Ask, tmp_path: Path) -> None:
    plant(tmp_path, {"sleeper.py": "import time\ntime.sleep(60)\n"})
    started = time.monotonic()
    with Child("sleeper", Imports, 60.0):
        pass
    assert time.monotonic() - started < 10
