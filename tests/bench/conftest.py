"""A synthetic model of toy size, made once: what the benchmarks build at real size; and the command
line to measure it with."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tierrun.bench.checkpoint import Shape, build_checkpoint
from tierrun.tools import cli
from tierrun.tools.convert import convert

Run = Callable[..., tuple[int, str, str]]

TOY = Shape(
    layers=2,
    experts=16,
    top_k=2,
    hidden=64,
    intermediate=32,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocabulary=512,
)


@pytest.fixture
def shape() -> Shape:
    return TOY


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `checkpoint/` and `store/`."""
    directory = tmp_path_factory.mktemp("synthetic")
    build_checkpoint(directory / "checkpoint", TOY)
    convert(directory / "checkpoint", directory / "store")
    return directory


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`tierrun bench` with some arguments: exit code, stdout, stderr."""

    def bench(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tierrun", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code, printed = ended.value.code, capsys.readouterr()
        return code if isinstance(code, int) else 0, printed.out, printed.err

    return bench


def refused(run: Run, *arguments: object) -> str:
    """The one line that these arguments get, and nothing else."""
    code, printed, error = run(*arguments)
    assert code in (1, 2) and printed == ""
    assert error.startswith("tierrun: ") and error.count("\n") == 1
    return error


class RecordedSteps:
    """What a run has shown (`tierrun.bench.steps.Steps`), and the seconds it said that takes."""

    def __init__(self) -> None:
        self.begun, self.ended = list[str](), list[str]()
        self.foreseen = self.passed = 0.0

    def expect(self, seconds: float) -> None:
        self.foreseen = seconds

    def begin(self, text: str) -> None:
        self.begun.append(text)

    def end(self, text: str, seconds: float) -> None:
        self.ended.append(text)
        self.passed += seconds
