"""The five folders are sub-packages of `tierrun`, and imports go one way only."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("io", "tiers", "engine", "bench", "tools")

MAY_IMPORT = {
    "io": {"io"},
    "tiers": {"tiers", "io"},
    "engine": {"engine", "tiers", "io"},
    "bench": set(FOLDERS),
    "tools": set(FOLDERS),
}
"""tools and bench are the two tops, side by side."""

MUST_NOT_IMPORT = {"io": {"torch", "transformers"}, "tiers": {"transformers"}}


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"no modules in {folder}/"
    return found


def imports(path: Path) -> Iterator[str]:
    """Every module named by an import statement anywhere in `path`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = str(node.module)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def run_python(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=environment, check=True, text=True, capture_output=True
    ).stdout.strip()


@pytest.mark.parametrize("folder", FOLDERS)
def test_subpackage_is_a_relative_link_to_its_folder(folder: str) -> None:
    link = ROOT / "src" / "tierrun" / folder
    assert link.is_symlink(), "checked out without symlinks; enable them (git config core.symlinks)"
    assert os.readlink(link) == f"../../{folder}"
    assert link.resolve() == ROOT / folder


def test_folders_are_namespace_packages() -> None:
    assert not [path for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    for path in modules(folder):
        for module in imports(path):
            package, _, rest = module.partition(".")
            assert package not in FOLDERS or package in sys.stdlib_module_names, f"{path}: {module}"
            if package == "tierrun" and rest.split(".")[0] in FOLDERS:
                assert rest.split(".")[0] in MAY_IMPORT[folder], f"{path} imports {module}"


@pytest.mark.parametrize("folder", MUST_NOT_IMPORT)
def test_lower_folders_know_no_framework(folder: str) -> None:
    for path in modules(folder):
        used = {module.split(".")[0] for module in imports(path)}
        assert not used & MUST_NOT_IMPORT[folder], path


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_shadows_the_standard_library(folder: str) -> None:
    """Of folders, `io` is given and `engine/codecs` is the design's; no file joins them."""
    assert not {path.stem for path in modules(folder)} & sys.stdlib_module_names


def test_importing_tierrun_imports_no_torch() -> None:
    code = "import sys, tierrun; tierrun.__version__; print('torch' in sys.modules)"
    assert run_python(code) == "False"


def test_io_works_without_torch() -> None:
    names = [f"tierrun.io.{path.stem}" for path in modules("io")]
    code = f"import sys, {', '.join(names)}; print({{'torch', 'transformers'}} & set(sys.modules))"
    assert run_python(code) == "set()"


def test_tierrun_offers_its_api_lazily() -> None:
    code = "import tierrun; print(callable(tierrun.load), tierrun.Engine, tierrun.convert)"
    first, engine, convert = run_python(code).split(" <")
    assert (first, engine) == ("True", "class 'tierrun.engine.engine.Engine'>")
    assert convert.startswith("function convert")
