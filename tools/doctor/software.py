"""Python and packages, against what pyproject.toml asks for."""

import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion

import tierrun
from tierrun.tools.doctor.line import Area, Line

SOFTWARE = Area("software")

_INSTALL = "pip install --upgrade {}"


def software_lines() -> list[Line]:
    """Python, and every package that tierrun asks for."""
    asked = requirements()
    versions = {one.name: installed(one.name) for one in needed(asked or ())}
    version = ".".join(map(str, sys.version_info[:3]))
    return [
        SOFTWARE.ok("Python", f"{version} ({sys.executable})"),
        *package_lines(asked, versions),
    ]


def requirements() -> list[str] | None:
    """What pyproject.toml asks for: of the checkout that this runs from, else as installed."""
    project = Path(tierrun.__file__).parents[2] / "pyproject.toml"
    try:
        found = tomllib.loads(project.read_text())["project"]
        if found["name"] == "tierrun":
            return list(found["dependencies"])
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        pass
    try:
        return metadata.requires("tierrun")
    except metadata.PackageNotFoundError:
        return None


def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def package_lines(asked: Iterable[str] | None, versions: Mapping[str, str | None]) -> list[Line]:
    """A line for every package that is missing or out of range, and one for all others.

    `versions` has what is installed of each package that is asked for.
    """
    if asked is None:
        return [
            SOFTWARE.unknown("packages", "tierrun is not installed, its needs are not recorded")
        ]
    fine, wrong = [], []
    for requirement in needed(asked):
        version = versions.get(requirement.name)
        if version is not None and _fits(requirement, version):
            fine.append(f"{requirement.name} {version}")
        else:
            wrong.append(_misfit(requirement, version))
    return [SOFTWARE.ok("packages", ", ".join(fine) or "none"), *wrong]


def needed(asked: Iterable[str]) -> list[Requirement]:
    """Those of `asked` that are for this platform and for no extra."""
    parsed = filter(None, map(_parse, asked))
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def _parse(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def _fits(requirement: Requirement, version: str) -> bool:
    try:
        return requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return False


def _misfit(requirement: Requirement, version: str | None) -> Line:
    wanted = f"{requirement.name}{requirement.specifier}"
    value = f"not installed, {wanted} is needed" if version is None else f"{version}, not {wanted}"
    return SOFTWARE.fail(requirement.name, value, _INSTALL.format(f"'{wanted}'"))
