"""Where results go: the terminal, files for programs and people, a plot, an older result."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tierrun.bench.cells import Results
from tierrun.bench.compare import Comparison, compare
from tierrun.bench.documents import Saved, read_document
from tierrun.bench.plots import check_plotting, plot_results
from tierrun.bench.report import document
from tierrun.bench.sheets import Sheet, to_csv
from tierrun.io.errors import UsageError


@dataclass(frozen=True, slots=True)
class Outputs:
    """What was asked for beside the table on the terminal."""

    json_file: Path | None = None
    csv_file: Path | None = None
    md_file: Path | None = None
    plot_file: Path | None = None
    compare_with: Path | None = None

    def check(self) -> Saved | None:
        """Whether all of it will be possible, before minutes are spent measuring; the old results.

        Raises:
            UsageError: it will not.
        """
        if self.plot_file is not None:
            check_plotting()
        for file in (self.json_file, self.csv_file, self.md_file, self.plot_file):
            if file is not None and not file.absolute().parent.is_dir():
                raise UsageError(f"{file} cannot be written: there is no such directory")
        return None if self.compare_with is None else read_document(self.compare_with)

    def deliver(
        self,
        results: Results,
        sheets: Sequence[Sheet],
        console: Console,
        old: Saved | None,
        draw: Callable[[Results, Path], None] = plot_results,
    ) -> None:
        """Print `results` as `sheets`, write the files, compare with `old`; `draw` plots them.

        Raises:
            UsageError: a file cannot be written, or the two results cannot be compared.
        """
        made = document(results.benchmark, results.to_json(), ("tierrun",))
        _show(console, sheets, results.notes)
        if self.json_file is not None:
            _write(self.json_file, json.dumps(made, indent=1) + "\n")
        if self.csv_file is not None:
            _write(self.csv_file, to_csv(results))
        if self.md_file is not None:
            _write(self.md_file, _markdown(sheets, results.notes, made["command"]))
        if self.plot_file is not None:
            draw(results, self.plot_file)
        if old is not None:
            show_comparison(compare(old, Saved.of("this run", made)), console)


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Its table and its notes."""
    _show(console, [comparison.sheet()], comparison.notes)


def _show(console: Console, sheets: Sequence[Sheet], notes: Sequence[str]) -> None:
    for sheet in sheets:
        console.print(sheet.table(), highlight=False)
    for note in notes:
        console.print(f"· {note}", highlight=False, markup=False)


def _markdown(sheets: Sequence[Sheet], notes: Sequence[str], command: str) -> str:
    parts = [*(sheet.markdown() for sheet in sheets), *(f"- {note}" for note in notes)]
    return "\n".join([*parts, "", f"`{command}`", ""])


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror or error}") from None
    print(f"written: {file}", file=sys.stderr)
