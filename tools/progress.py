"""The progress bar of a long transfer: share done, GB/s, time left; on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tierrun.tools.convert import Progress as Callback


@contextmanager
def progress_bar(description: str, console: Console | None = None) -> Iterator[Callback]:
    """A callable for `convert` or `verify` that draws a bar; silent where there is no terminal."""
    console = console or Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(description, total=None)
        started = False

        def report(done: int, total: int, /) -> None:
            nonlocal started
            if not started:  # what an earlier run wrote is no speed of this one
                bar.reset(task, total=total, completed=done)
                started = True
            bar.update(task, completed=done, total=total)

        yield report
