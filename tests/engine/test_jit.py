"""Compiled kernels outlive the process, and no change of what they were made of."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tierrun
from tierrun.engine.kernels import jit

KERNEL = """
from tierrun.engine.kernels.jit import njit
from tierrun.engine.kernels.native import real


@njit("float32(int64)", cache=True)
def first(address):
    return real(address)
"""
PROGRAM = """
import numpy as np
from tierrun.engine.kernels.probe import first
print(first(np.ones(1, np.float32).ctypes.data), sum(first.stats.cache_hits.values()))
"""


def run(tree: Path) -> tuple[float, int]:
    """What the kernel of `tree` makes of a 1, and how often code came from the disk."""
    command = [sys.executable, "-c", PROGRAM]
    environment = {"PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin", "HOME": str(tree)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tree)
    assert done.returncode == 0, done.stderr
    number, hits = done.stdout.split()
    return float(number), int(hits)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package's sources without any compiled code, and one kernel more."""
    package = Path(tierrun.__file__).parent
    skip = shutil.ignore_patterns("__pycache__", "tests")
    shutil.copytree(package, tmp_path / "tierrun", ignore=skip)
    (tmp_path / "tierrun/engine/kernels/probe.py").write_text(KERNEL)
    return tmp_path


def test_compiled_code_is_kept_until_a_file_that_it_inlined_changes(tree: Path) -> None:
    assert run(tree) == (1, 0)
    assert run(tree) == (1, 1)
    native = tree / "tierrun/engine/kernels/native.py"
    text = native.read_text()
    loads = "builder.load(at(builder, arguments[0], F32))"
    assert loads in text
    native.write_text(text.replace(loads, f"builder.fmul({loads}, F32(2.0))"))
    assert run(tree) == (2, 0)
    assert run(tree) == (2, 1)


def test_kernels_take_numbas_compilers_from_jit_alone() -> None:
    for path in jit.KERNELS.glob("*.py"):
        if path.name == "jit.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numba"):
                names = {alias.name for alias in node.names}
                assert not names & {"njit", "jit", "cfunc", "vectorize"}, path
            assert not (isinstance(node, ast.Import) and node.names[0].name == "numba"), path


def test_the_digest_covers_what_kernels_are_made_of() -> None:
    """Code of theirs from elsewhere would be inlined unseen."""
    host_side = {
        "tierrun.engine.gpu.layout",  # read by Python, never compiled
        "tierrun.engine.recognise",
        "tierrun.io.errors",
        "tierrun.io.extent",
        "tierrun.io.store",
    }
    covered = {path.parent.name for path in jit.sources()}
    assert covered == {"codecs", "kernels"}
    for path in jit.sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tierrun"):
                assert node.module is not None
                inside = node.module.startswith(("tierrun.engine.kernels", "tierrun.engine.codecs"))
                assert inside or node.module in host_side, (path, node.module)
