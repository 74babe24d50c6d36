"""The results of a benchmark: cells, each with what was measured and one sample per round.

All samples are kept, since two runs can only be told apart by how far their rounds lie from each
other (`tierrun.bench.compare`). They are in bytes, seconds, and bytes or pieces per second; how a
metric is shown, and whether more of it is better, stands beside them, so that a document can be
shown and compared by a program that does not know the benchmark.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from tierrun.bench.report import Spread, spread

Value: TypeAlias = str | int


class Metric(NamedTuple):
    """A quantity, and how it is shown: `label` names the unit of samples times `scale`."""

    name: str
    label: str
    scale: float
    digits: int
    higher_is_better: bool


class Cell(NamedTuple):
    """What was measured (`key`), and by metric a sample of each round."""

    key: Mapping[str, Value]
    samples: Mapping[str, tuple[float, ...]]

    def spread(self, metric: Metric) -> Spread:
        """Of the rounds; bytes, seconds or per second."""
        return spread(self.samples[metric.name])


@dataclass(frozen=True, slots=True)
class Results:
    """What a benchmark found; the first of `metrics` is what it is about.

    All cells have the same names in their keys. `setting` is what was asked for and on what,
    `notes` is what the reader of the numbers has to know, a sentence each; `details` is the
    benchmark's own, which nobody compares.
    """

    benchmark: str
    metrics: tuple[Metric, ...]
    cells: tuple[Cell, ...]
    setting: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The part of a document that is not about where it comes from."""
        return {
            "setting": dict(self.setting),
            "notes": list(self.notes),
            "metrics": [metric._asdict() for metric in self.metrics],
            "cells": [{"key": dict(c.key), "samples": dict(c.samples)} for c in self.cells],
            "details": dict(self.details),
        }

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> "Results":
        """Raises KeyError, TypeError, ValueError or AttributeError: not such a document."""
        metrics = tuple(Metric(**entry) for entry in document["metrics"])
        return Results(
            benchmark=str(document["benchmark"]),
            metrics=metrics,
            cells=tuple(_cell(entry, metrics) for entry in document["cells"]),
            setting=dict(document["setting"]),
            notes=tuple(str(note) for note in document["notes"]),
            details=dict(document["details"]),
        )


def _cell(entry: Mapping[str, Any], metrics: Sequence[Metric]) -> Cell:
    samples = {
        metric.name: tuple(float(x) for x in entry["samples"][metric.name]) for metric in metrics
    }
    if not all(samples.values()):
        raise ValueError("a cell without samples")
    return Cell(dict(entry["key"].items()), samples)
