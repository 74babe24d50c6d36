"""Logits on the GPU against the fp32 CPU engine, for every family that must run, and for codecs.

    python -m tierrun.bench.gpu_parity            (from the repository's root: it uses `tests`)

Tiny random checkpoints, with VRAM for half of the experts. Each row: how far the logits of a prompt
and of decode steps are, ‖gpu − cpu‖ / ‖cpu‖, as the engine runs by default, exact and (some)
compiled; whether eager and recorded passes choose the same tokens under `exact`; how many graphs a
token is. Rows run in a process of their own, which is replaced when a row breaks it.
"""

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from tierrun.bench import devices
from tierrun.bench.devices import Setting, say
from tierrun.bench.parity_rows import STEPS, Case, Row, run_case, tiny_models
from tierrun.bench.report import document, emit, open_console, run_script
from tierrun.io.errors import TierrunError, UsageError

CODECS = ("q4_k", "q8_0", "mxfp4", "fp8_g128_f32")


class Workers:
    """One process at a time that computes rows; a new one after a row that broke it."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._pool = self._start()

    @staticmethod
    def _start() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def row(self, case: Case, setting: Setting) -> Row:
        """The row of `case`, whatever becomes of the process."""
        future: Future[Row] = self._pool.submit(run_case, case, setting)
        try:
            row = future.result(self._patience)
        except Exception as error:  # killed, or hung
            text = f"the process died or hung: {type(error).__name__} {error}".strip()
            row = Row(case, failures={"process": text}, poisoned=True)
        if row.poisoned:
            self.close()
            self._pool = self._start()
        return row

    def close(self) -> None:
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(cancel_futures=True)


def parity_table(rows: Sequence[Row], tolerance: float, title: str) -> Table:
    """A line for each row, and one below it for each failure."""
    table = Table(title=title)
    shown = ("default", "exact", "compiled")
    for name in ("", *shown, "turned", "others", "eager, graphs", "as cpu", "graphs", ""):
        table.add_column(name, overflow="fold")
    for row in rows:
        errors = [row.arms[name].text() if name in row.arms else "" for name in shown]
        same = {True: "same", False: "DIFFERENT", None: ""}[row.same_tokens]
        verdict = "ok" if row.passed(tolerance) else "FAILED"
        steady = row.steady.text() if row.steady else ""
        counts = (str(row.turned), steady, same, f"{row.cpu_tokens}/{STEPS}", row.captured, verdict)
        table.add_row(row.case.title, *errors, *counts)
        for part, text in row.failures.items():
            table.add_row(f"  {part}", *[""] * 7, text, "")
    return table


def cases(only: str) -> list[Case]:
    """All, or those that the comma-separated `only` names.

    Raises:
        UsageError: it names something else.
    """
    everything = [
        *map(Case, tiny_models().ACCEPTED),
        *(Case("qwen3_moe", codec) for codec in CODECS),
    ]
    if not only:
        return everything
    titles = {case.title: case for case in everything}
    unknown = [title for title in only.split(",") if title not in titles]
    if unknown:
        raise UsageError(f"--only {unknown[0]}: choose among {', '.join(titles)}")
    return [titles[title] for title in only.split(",")]


def main(
    device: devices.Device = "cuda",
    vram: devices.VramBudget = "50%experts",
    ram: devices.RamBudget = "1GiB",
    compile_: devices.Compile = "off",
    graphs: devices.Graphs = True,
    only: Annotated[str, typer.Option(help="Rows, comma-separated: 'olmoe,qwen3_moe q4_k'.")] = "",
    tolerance: Annotated[float, typer.Option(help="Largest relative error let pass.")] = 0.02,
    patience: Annotated[float, typer.Option(help="Seconds for one row.")] = 240.0,
    json_file: devices.JsonFile = None,
) -> None:
    """Compare the GPU with the fp32 CPU engine, family by family."""
    devices.check_device(device)
    setting = Setting(device, vram, ram, compile_, graphs, context=256)
    workers, rows = Workers(patience), list[Row]()
    try:
        for case in cases(only):
            rows.append(_timed(workers, case, setting))
    finally:
        workers.close()
    open_console().print(parity_table(rows, tolerance, f"‖{device} − cpu‖ / ‖cpu‖: prompt, decode"))
    results = {"tolerance": tolerance, "setting": asdict(setting)}
    results["rows"] = [asdict(row) | {"passed": row.passed(tolerance)} for row in rows]
    emit(document("gpu_parity", results), json_file)
    failed = [row.case.title for row in rows if not row.passed(tolerance)]
    if failed:
        raise TierrunError(f"{len(failed)} of {len(rows)} rows failed: {', '.join(failed)}")


def _timed(workers: Workers, case: Case, setting: Setting) -> Row:
    started = time.perf_counter()
    row = workers.row(case, setting)
    arms = ", ".join(f"{name} {errors.text()}" for name, errors in row.arms.items())
    failed = "".join(f"; {part} FAILED: {text}" for part, text in row.failures.items())
    outcome = f"{arms}; {row.captured}; same tokens: {row.same_tokens}{failed}"
    say(f"{case.title}: {outcome} ({time.perf_counter() - started:.1f} s)")
    return row


if __name__ == "__main__":
    run_script(main)
