"""What the doctor says: lines, each with what to do about it, and the report that they make."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Status(StrEnum):
    """How it is; `unknown`: this machine does not tell, which is nobody's fault."""

    OK = "ok"
    UNKNOWN = "unknown"
    WARN = "warn"
    FAIL = "fail"


class Line(BaseModel):
    """One finding. What warns or fails says what to do about it, nothing else does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    area: str = Field(min_length=1, description="A part of the machine, or a directory.")
    name: str = Field(min_length=1, description="What was looked at.")
    status: Status
    value: str = Field(min_length=1, description="What was found, for people to read.")
    advice: str | None = Field(description="What to do about it; null where nothing is wrong.")

    @model_validator(mode="after")
    def _advise_where_wrong(self) -> "Line":
        if (self.status in (Status.WARN, Status.FAIL)) != bool(self.advice):
            raise ValueError(f"{self.name}: status {self.status}, advice {self.advice!r}")
        return self


class Report(BaseModel):
    """All lines; `status` is the worst of theirs, where what is unknown counts as ok."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = Field(description="Of this format.")
    tierrun: str = Field(description="Version of tierrun.")
    seconds: float = Field(ge=0, description="How long the examination took.")
    status: Literal["ok", "warn", "fail"]
    lines: tuple[Line, ...]

    @model_validator(mode="after")
    def _sum_up(self) -> "Report":
        if self.status != _worst(self.lines):
            raise ValueError(f"status {self.status}, but the worst line is {_worst(self.lines)}")
        return self

    @classmethod
    def of(cls, lines: Iterable[Line], tierrun: str, seconds: float) -> "Report":
        """The report that `lines` make."""
        found = tuple(lines)
        return cls(version=1, tierrun=tierrun, seconds=seconds, status=_worst(found), lines=found)

    def exit_code(self, *, strict: bool) -> int:
        """1 where something fails, and with `strict` where something warns; else 0."""
        return int(self.status == "fail" or (strict and self.status == "warn"))


def _worst(lines: Iterable[Line]) -> Literal["ok", "warn", "fail"]:
    found = {line.status for line in lines}
    return "fail" if Status.FAIL in found else "warn" if Status.WARN in found else "ok"


@dataclass(frozen=True, slots=True)
class Area:
    """A part of the machine, and how lines about it are made."""

    name: str

    def ok(self, name: str, value: str) -> Line:
        """Nothing is wrong with it."""
        return Line(area=self.name, name=name, status=Status.OK, value=value, advice=None)

    def unknown(self, name: str, reason: str) -> Line:
        """This machine does not tell; `reason` says why, or what little is known."""
        return Line(area=self.name, name=name, status=Status.UNKNOWN, value=reason, advice=None)

    def warn(self, name: str, value: str, advice: str) -> Line:
        """It works, but slower or with less than this machine could."""
        return Line(area=self.name, name=name, status=Status.WARN, value=value, advice=advice)

    def fail(self, name: str, value: str, advice: str) -> Line:
        """Something does not work until it is mended."""
        return Line(area=self.name, name=name, status=Status.FAIL, value=value, advice=advice)
