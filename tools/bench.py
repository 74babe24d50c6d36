"""`tierrun bench`: the bandwidth suite. What is heavy is imported inside the commands."""

from pathlib import Path
from typing import Annotated

import typer

from tierrun.tools.arguments import store_directories

bench_app = typer.Typer(
    help="Measure what this machine gives, and compare two measurements.",
    invoke_without_command=True,
)


@bench_app.callback()
def bench(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


Directories = Annotated[
    list[Path] | None,
    typer.Option(
        "--nvme-dir",
        help="Directory on the drive; repeat it to measure several alone and together. "
        "[env var: TIERRUN_NVME_DIR]",
        show_default=False,
    ),
]
Device = Annotated[
    str, typer.Option("--device", envvar="TIERRUN_DEVICE", help="auto, cpu, cuda, cuda:N.")
]
Duration = Annotated[
    float | None,
    typer.Option("--duration", help="Seconds of each cell and round. Default: what ends in time."),
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="How often each cell is measured.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write all samples to this file.")
]
CsvFile = Annotated[
    Path | None, typer.Option("--csv", metavar="FILE", help="Write a line per cell to this file.")
]
MdFile = Annotated[
    Path | None, typer.Option("--md", metavar="FILE", help="Write the table as Markdown.")
]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw it (.png, .svg, .pdf).")
]
CompareFile = Annotated[
    Path | None,
    typer.Option("--compare", metavar="OLD.json", help="Show the change against older results."),
]


@bench_app.command("io")
def bench_io(
    nvme_dir: Directories = None,
    sizes: Annotated[
        str | None,
        typer.Option("--sizes", help="Record sizes: 1.8MB,8MiB. Default: a store's and models'."),
    ] = None,
    depths: Annotated[
        str | None, typer.Option("--depths", help="Reads in flight per directory: 1,4,16.")
    ] = None,
    readers: Annotated[
        str | None,
        typer.Option(
            "--readers",
            help="direct, mmap, mmap-warm, buffered, kvikio-compat, kvikio-gds. Default: all there",
        ),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="random (the default), sequential, both.")
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Every size, depth and pattern; the best part of an hour."),
    ] = False,
    size: Annotated[
        str | None,
        typer.Option("--size", help="Test file, where a directory holds no store. Default: 8GiB."),
    ] = None,
    device: Device = "auto",
    vs_fio: Annotated[
        bool, typer.Option("--vs-fio", help="Direct reads only, in turns with fio.")
    ] = False,
    duration: Duration = None,
    rounds: Rounds = 5,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    md_file: MdFile = None,
    plot_file: PlotFile = None,
    compare: CompareFile = None,
) -> None:
    """How fast drives give whole records, by size, depth and reader: about two minutes.

    A directory with a store is read only; elsewhere a test file is made and removed.
    """
    directories = store_directories(None, nvme_dir)
    from tierrun.bench.ending import ended_by_signals
    from tierrun.bench.io_plan import Plan
    from tierrun.bench.io_run import Request, run_io
    from tierrun.bench.outputs import Outputs
    from tierrun.bench.report import open_console
    from tierrun.io.extent import parse_bytes

    plan = Plan.of(sizes, depths, readers, pattern, full, rounds, duration)
    file_bytes = None if size is None else parse_bytes(size)
    outputs = Outputs(json_file, csv_file, md_file, plot_file, compare)
    old = outputs.check()
    with ended_by_signals():
        found = run_io(Request(tuple(directories), plan, file_bytes, device, vs_fio))
    outputs.deliver(found.results, found.sheets, open_console(), old)
    if found.ended is not None:
        raise found.ended


@bench_app.command("copies")
def bench_copies(
    nvme_dir: Annotated[
        list[Path] | None,
        typer.Option("--nvme-dir", help="A store: its records' sizes are measured, too."),
    ] = None,
    tests: Annotated[
        str | None, typer.Option("--tests", help="memory_read,host_to_device_memcpy_ce. All.")
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option("--sizes", help="Of copies: 64KiB,1.8MB. Default: 64 KiB to 256 MiB."),
    ] = None,
    threads: Annotated[
        str | None, typer.Option("--threads", help="That read memory: 1,4. Default: 1, 2, 4 … all.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Every size, half a second each.")] = False,
    device: Device = "auto",
    duration: Duration = None,
    rounds: Rounds = 5,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    md_file: MdFile = None,
    plot_file: PlotFile = None,
    compare: CompareFile = None,
) -> None:
    """How fast bytes get from memory to memory: host, GPU and between, by size: about a minute.

    Without a GPU only host memory is measured.
    """
    from tierrun.bench.copies_plan import Plan
    from tierrun.bench.copies_run import Request, run_copies
    from tierrun.bench.ending import ended_by_signals
    from tierrun.bench.outputs import Outputs
    from tierrun.bench.report import open_console

    plan = Plan.of(tests, sizes, threads, full, rounds, duration)
    outputs = Outputs(json_file, csv_file, md_file, plot_file, compare)
    old = outputs.check()
    with ended_by_signals():
        results, sheets = run_copies(Request(plan, tuple(nvme_dir or ()), device))
    outputs.deliver(results, sheets, open_console(), old)


@bench_app.command("kernels")
def bench_kernels(
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            help="Models' experts (glm-5), experts (2048x512:8/256: hidden, inner, top-k of how "
            "many), matrices (4096x14336: inputs, outputs). Default: qwen3.6-35b-a3b.",
        ),
    ] = None,
    codecs: Annotated[
        str | None, typer.Option("--codecs", help="q4_k,mxfp4, or all. Default: the usual ones.")
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option("--kernels", help="Of the CPU: int8, fp32, expand. Default: all of them."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Of a call: 1,8,512. Default: from 1 to 2048.")
    ] = None,
    threads: Annotated[
        str | None, typer.Option("--threads", help="Of the CPU: 1,4. Default: all cores.")
    ] = None,
    cached: Annotated[
        bool,
        typer.Option("--cached", help="The CPU also with one expert's weights, from its caches."),
    ] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Every codec and number of tokens; the best part of an hour."),
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            "--device", envvar="TIERRUN_DEVICE", help="auto (the CPU and a GPU), cpu, cuda, cuda:N."
        ),
    ] = "auto",
    duration: Duration = None,
    rounds: Rounds = 5,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    md_file: MdFile = None,
    plot_file: PlotFile = None,
    compare: CompareFile = None,
) -> None:
    """How fast a layer is computed from packed weights, by codec and tokens: about two minutes.

    Shares are of the memory's bandwidth and of torch's products, measured in the same run.
    """
    from tierrun.bench.ending import ended_by_signals
    from tierrun.bench.kernels_plan import Plan
    from tierrun.bench.kernels_run import Request, run_kernels
    from tierrun.bench.outputs import Outputs
    from tierrun.bench.report import open_console

    plan = Plan.of(layers, codecs, kernels, tokens, threads, cached, full, rounds, duration)
    outputs = Outputs(json_file, csv_file, md_file, plot_file, compare)
    old = outputs.check()
    with ended_by_signals():
        results, sheets = run_kernels(Request(plan, device))
    outputs.deliver(results, sheets, open_console(), old)


@bench_app.command("compare")
def bench_compare(
    old: Annotated[Path, typer.Argument(metavar="OLD.json", help="From a bench's --json.")],
    new: Annotated[Path, typer.Argument(metavar="NEW.json", help="The same, later.")],
    metric: Annotated[
        str | None, typer.Option("--metric", help="Which to compare. Default: the first.")
    ] = None,
) -> None:
    """Show what changed between two results by more than the spread of their rounds."""
    from tierrun.bench.compare import compare
    from tierrun.bench.documents import read_document
    from tierrun.bench.outputs import show_comparison
    from tierrun.bench.report import open_console

    comparison = compare(read_document(old), read_document(new), metric)
    show_comparison(comparison, open_console())
