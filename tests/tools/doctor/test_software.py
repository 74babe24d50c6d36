"""Packages against their ranges, compilers, and caches."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tools.doctor.trees import plant

from tierrun.tools.doctor.child import Answer
from tierrun.tools.doctor.compiling import (
    cache_line,
    cache_places,
    compiler_line,
    find_compiler,
    import_lines,
)
from tierrun.tools.doctor.facts import Imports
from tierrun.tools.doctor.software import needed, package_lines, requirements

ASKED = ["torch>=2.11", "transformers>=5.23,<6", 'kvikio-cu13>=25; extra == "gds"']


def test_packages_in_range() -> None:
    versions = {"torch": "2.13.0+cpu", "transformers": "5.24.0.dev0"}
    (line,) = package_lines(ASKED, versions)
    assert (line.status, line.value) == ("ok", "torch 2.13.0+cpu, transformers 5.24.0.dev0")


@pytest.mark.parametrize("version", ["5.17.0", "6.0.0", "not a version"])
def test_a_package_out_of_range_fails(version: str) -> None:
    fine, wrong = package_lines(ASKED, {"torch": "2.11.0", "transformers": version})
    assert fine.value == "torch 2.11.0" and wrong.status == "fail"
    assert wrong.name == "transformers" and wrong.value.startswith(f"{version}, not transformers")
    assert wrong.advice is not None and wrong.advice.startswith("pip install --upgrade 'transform")


def test_a_package_that_is_missing_fails() -> None:
    _, wrong = package_lines(ASKED, {"torch": "2.11.0", "transformers": None})
    assert (wrong.status, wrong.value[:13]) == ("fail", "not installed")


def test_needs_that_are_not_recorded_are_unknown() -> None:
    (line,) = package_lines(None, {})
    assert line.status == "unknown"


@given(texts=st.lists(st.text()))
def test_requirements_of_any_text_break_nothing(texts: list[str]) -> None:
    assert len(package_lines(texts, {})) == 1 + len(needed(texts))


def test_what_is_asked_for_comes_from_pyproject() -> None:
    names = {requirement.name for requirement in needed(requirements() or [])}
    assert {"torch", "transformers", "pydantic"} <= names and "kvikio-cu13" not in names


@pytest.mark.parametrize(
    ("numba", "triton", "gpu", "statuses"),
    [
        (None, None, True, ["ok", "ok"]),
        ("no llvmlite", None, False, ["fail", "ok"]),
        (None, "No module named 'triton'", False, ["ok", "ok"]),
        (None, "No module named 'triton'", True, ["ok", "fail"]),
    ],
)
def test_imports(numba: str | None, triton: str | None, gpu: bool, statuses: list[str]) -> None:
    lines = import_lines(Answer(Imports(numba=numba, triton=triton), ""), gpu)
    assert [line.status for line in lines] == statuses


def test_imports_that_nobody_tried_are_unknown() -> None:
    lines = import_lines(Answer(None, "no answer"), True)
    assert [(line.status, line.value) for line in lines] == [("unknown", "no answer")] * 2


@pytest.mark.parametrize(
    ("compiler", "headers", "gpu", "status"),
    [
        ("/usr/bin/gcc", True, True, "ok"),
        ("/usr/bin/gcc", False, True, "fail"),
        (None, True, True, "fail"),
        (None, False, False, "ok"),
    ],
)
def test_compiler(
    tmp_path: Path, compiler: str | None, headers: bool, gpu: bool, status: str
) -> None:
    if headers:
        plant(tmp_path, {"Python.h": ""})
    line = compiler_line(compiler, tmp_path, gpu)
    assert line.status == status
    assert ("no Python.h" in line.value) == (not headers)


def test_the_compiler_is_the_one_that_triton_takes(tmp_path: Path) -> None:
    for name in ("gcc", "clang", "mycc"):
        plant(tmp_path, {name: "#!/bin/sh\n"}).joinpath(name).chmod(0o755)
    path = str(tmp_path)
    assert find_compiler({"PATH": path}) == f"{path}/gcc"
    assert find_compiler({"PATH": path, "CC": "mycc"}) == f"{path}/mycc"
    assert find_compiler({"PATH": path, "CC": "gone"}) is None
    (tmp_path / "gcc").unlink()
    assert find_compiler({"PATH": path}) == f"{path}/clang"


def test_caches_are_where_the_environment_puts_them(tmp_path: Path) -> None:
    plain = cache_places({}, tmp_path)
    assert plain["tierrun"] == [tmp_path / ".cache/tierrun"]
    assert plain["Triton"] == [tmp_path / ".triton/cache"]
    moved = {"XDG_CACHE_HOME": "/x", "TRITON_CACHE_DIR": "/t", "NUMBA_CACHE_DIR": "/n"}
    assert cache_places(moved, tmp_path) == {
        "tierrun": [Path("/x/tierrun")],
        "Triton": [Path("/t")],
        "numba": [Path("/n")],
    }
    assert cache_places({"TRITON_HOME": "/h"}, tmp_path)["Triton"] == [Path("/h/.triton/cache")]


def test_a_cache_that_cannot_be_written_warns(tmp_path: Path) -> None:
    plant(tmp_path, {"file": "in the way"})
    good, bad = tmp_path / "not/yet/there", tmp_path / "file/cache"
    assert cache_line({"numba": [bad, good]}).value == f"numba {good}"
    line = cache_line({"numba": [bad], "Triton": [good]})
    assert line.status == "warn"
    assert line.value == f"not writable: numba {bad}; writable: Triton {good}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_of_another_user_warns(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert cache_line({"numba": [tmp_path / "cache"]}).status == "warn"
