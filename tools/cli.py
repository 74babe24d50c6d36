"""The command line. Everything heavy is imported inside the commands, so that --help is quick."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import tierrun
from tierrun.engine.options import Options
from tierrun.io.errors import TierrunError, UsageError
from tierrun.tools.arguments import (
    Json,
    NvmeDir,
    StoreArgument,
    Verbose,
    named_directories,
    normalise,
    parse_ids,
    read_prompt,
    store_directories,
)
from tierrun.tools.bench import bench_app
from tierrun.tools.bench_models import add_model_commands

log = logging.getLogger(__name__)

_DEFAULT = Options()

app = typer.Typer(
    help="Run Mixture-of-Experts models larger than VRAM, larger than RAM, larger than both.\n\n"
    "tierrun --nvme-dir DIR: a chat; with -p TEXT: one completion "
    "(all options: tierrun run --help).",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


add_model_commands(bench_app)
app.add_typer(bench_app, name="bench")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"tierrun {tierrun.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    store: StoreArgument = None,
    nvme_dir: NvmeDir = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Raw text to continue; - reads stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Prompt from a file.")] = None,
    token_ids: Annotated[
        str | None, typer.Option("--token-ids", help="Prompt as token ids: 1,22,333.")
    ] = None,
    predict: Annotated[
        int, typer.Option("-n", "--predict", "--max-tokens", help="Tokens to make; -1: no limit.")
    ] = -1,
    ctx_size: Annotated[
        int, typer.Option("-c", "--ctx-size", "--max-model-len", help="Context; 0: the model's.")
    ] = _DEFAULT.context,
    threads: Annotated[
        int,
        typer.Option("-t", "--threads", envvar="TIERRUN_THREADS", help="0: all; torch one less."),
    ] = _DEFAULT.threads,
    ubatch: Annotated[
        int,
        typer.Option("-ub", "--ubatch-size", help="Prompt tokens per forward pass; 0: chosen."),
    ] = _DEFAULT.ubatch,
    temp: Annotated[
        float | None, typer.Option("--temp", help="0: greedy. Default: the model's.")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="0: off.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="1: off.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", help="0: off.")] = None,
    repeat_penalty: Annotated[
        float | None, typer.Option("--repeat-penalty", help="1: off.")
    ] = None,
    seed: Annotated[int | None, typer.Option("-s", "--seed", help="Default: random.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", "-r", "--reverse-prompt", help="End the answer at this text."),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past end-of-sequence.")
    ] = False,
    fixed_tokens: Annotated[
        str | None,
        typer.Option("--fixed-tokens", help="Token ids fed instead of sampled ones (benchmarks)."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", envvar="TIERRUN_DEVICE", help="auto, cpu, cuda, cuda:N.")
    ] = _DEFAULT.device,
    vram: Annotated[
        str,
        typer.Option("--vram", envvar="TIERRUN_VRAM", help="Hot tier: auto, 0, 8GiB, 50%."),
    ] = _DEFAULT.vram,
    ram: Annotated[
        str, typer.Option("--ram", envvar="TIERRUN_RAM", help="Warm tier: auto, 0, 8GiB, 50%.")
    ] = _DEFAULT.ram,
    io: Annotated[
        str, typer.Option("--io", envvar="TIERRUN_IO", help="auto, direct, mmap, buffered, gds.")
    ] = _DEFAULT.io,
    policy: Annotated[
        str, typer.Option("--policy", help="Replacement: rates, lfru, lru, layers.")
    ] = (_DEFAULT.policy),
    lookahead: Annotated[
        str, typer.Option("--lookahead", help="Read what the next layer will want: on, off.")
    ] = "on",
    depth: Annotated[
        int, typer.Option("--depth", help="Reads in flight per directory.")
    ] = _DEFAULT.depth,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Fixed kernels: fp32 on the CPU, any budget's bits on a GPU."),
    ] = False,
    lanes: Annotated[
        str,
        typer.Option("--lanes", help="Experts in RAM, beside a GPU: auto, gpu, cpu."),
    ] = _DEFAULT.lanes,
    compile_: Annotated[
        str, typer.Option("--compile", help="torch.compile on the GPU: auto, on, off.")
    ] = _DEFAULT.compile,
    graphs: Annotated[
        str, typer.Option("--graphs", help="CUDA graphs for decode: on, off.")
    ] = "on",
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where something cannot be done as asked.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Chat with a model, or continue a prompt (-p, -f, --token-ids, or a pipe)."""
    _set_up_logging(verbose)
    directories = store_directories(store, nvme_dir)
    fixed = tuple(parse_ids(fixed_tokens, "--fixed-tokens")) if fixed_tokens else ()
    text = read_prompt(prompt, file, token_ids)
    if text is None and as_json:
        raise UsageError("--json wants a prompt: -p, -f, --token-ids or a pipe")
    from tierrun.engine.engine import load
    from tierrun.tools.generate import Request, chat, complete

    with load(
        directories,
        device=device,
        vram=vram,
        ram=ram,
        io=io,
        policy=policy,
        lookahead=_switch("--lookahead", lookahead),
        context=ctx_size,
        ubatch=ubatch,
        threads=threads,
        depth=depth,
        exact=exact,
        lanes=lanes,
        compile=compile_,
        graphs=_switch("--graphs", graphs),
        strict=strict,
    ) as engine:
        sampling = engine.defaults.sampling(
            temperature=temp,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repeat_penalty,
            seed=seed,
        )
        if sampling.temperature == 0 and not {top_k, top_p, min_p, seed} <= {None}:
            log.warning("at temperature 0 the most probable token is taken; give --temp to sample")
        request = Request(predict, sampling, tuple(stop or ()), ignore_eos, fixed)
        if text is None:
            chat(engine, request)
            return
        answer = complete(engine, text, request, as_json=as_json)
    if answer.interrupted:
        raise typer.Exit(130)


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="Checkpoint directory, .gguf file, or hub id (with :Q4_K_M for one of GGUFs).",
        ),
    ],
    nvme_dir: NvmeDir = None,
    config: Annotated[
        str | None, typer.Option("--config", help="For a GGUF: directory or hub id of config.json.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="For a GGUF: directory or hub id of another.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Store floats as bf16, f16 or f32.")
    ] = None,
    quant: Annotated[
        str | None, typer.Option("--quant", help="Quantise experts: q8_0, q4_0 or mxfp4.")
    ] = None,
    quant_resident: Annotated[
        str | None, typer.Option("--quant-resident", help="Quantise linear and embedding weights.")
    ] = None,
    requant: Annotated[
        str | None,
        typer.Option("--requant", help="Quantise anew (lossy) what tierrun has no codec for."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    verbose: Verbose = False,
) -> None:
    """Make a store from a checkpoint; interrupted, the same command continues."""
    _set_up_logging(verbose)
    directories = store_directories(None, nvme_dir)
    from tierrun.tools.convert import convert as convert_checkpoint
    from tierrun.tools.progress import progress_bar

    try:
        with progress_bar("converting") as progress:
            convert_checkpoint(
                source,
                directories,
                config=config,
                tokenizer=tokenizer,
                dtype=dtype,
                quant=quant,
                quant_resident=quant_resident,
                requant=requant,
                force=force,
                progress=progress,
            )
    except KeyboardInterrupt:
        typer.echo("tierrun: stopped; the same command continues from here", err=True)
        raise typer.Exit(130) from None
    _print_listing(directories, as_json=False)


@app.command()
def verify(store: StoreArgument = None, nvme_dir: NvmeDir = None, verbose: Verbose = False) -> None:
    """Check every checksum of a store."""
    _set_up_logging(verbose)
    from tierrun.io.store import Store
    from tierrun.tools.progress import progress_bar
    from tierrun.tools.verify import verify as verify_store

    opened = Store.open(store_directories(store, nvme_dir))
    with progress_bar("verifying") as progress:
        report = verify_store(opened, progress)
    typer.echo(report.line())


@app.command("ls")
def list_store(
    store: StoreArgument = None, nvme_dir: NvmeDir = None, as_json: Json = False
) -> None:
    """Print what a store holds."""
    _print_listing(store_directories(store, nvme_dir), as_json=as_json)


@app.command()
def stats(
    store: StoreArgument = None,
    nvme_dir: NvmeDir = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write the curve to this PNG file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which experts were used, over all runs of a store."""
    from rich.console import Console

    from tierrun.io.store import read_manifest
    from tierrun.tiers.usage import UsageFile
    from tierrun.tools import stats as statistics

    root = store_directories(store, nvme_dir)[0]
    usage = UsageFile(root, read_manifest(root)).read()
    if plot is not None:
        statistics.plot(usage, plot)
    if as_json:
        typer.echo(json.dumps(statistics.record(usage)))
    else:
        Console().print(statistics.table(usage))


@app.command()
def doctor(
    directories: StoreArgument = None,
    nvme_dir: NvmeDir = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 where something warns, too.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of --json, examine nothing.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what this machine is and what is wrong with it; exits with 1 where something fails."""
    _set_up_logging(verbose)
    from rich.console import Console

    from tierrun.tools.doctor.examine import examine
    from tierrun.tools.doctor.line import Report
    from tierrun.tools.doctor.report import render

    if schema:
        typer.echo(json.dumps(Report.model_json_schema(), indent=2))
        return
    report = examine(named_directories(directories, nvme_dir))
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        Console().print(render(report))
    raise typer.Exit(report.exit_code(strict=strict))


@app.command("plan")
def plan_command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL_OR_STORE]",
            help="Store, checkpoint directory, config.json, .gguf file, or hub id (of which only "
            "the configuration is fetched).",
            show_default=False,
        ),
    ] = None,
    nvme_dir: Annotated[
        list[Path] | None,
        typer.Option(
            "--nvme-dir",
            help="Directory of the store, or of the drive that it will be on, which is measured; "
            "repeat it for several. [env var: TIERRUN_NVME_DIR]",
            show_default=False,
        ),
    ] = None,
    vram: Annotated[
        str,
        typer.Option("--vram", envvar="TIERRUN_VRAM", help="Hot tier: auto, 0, 8GiB, 50%."),
    ] = _DEFAULT.vram,
    ram: Annotated[
        str, typer.Option("--ram", envvar="TIERRUN_RAM", help="Warm tier: auto, 0, 8GiB, 50%.")
    ] = _DEFAULT.ram,
    context: Annotated[
        int, typer.Option("-c", "--context", "--ctx-size", help="Tokens before the one predicted.")
    ] = 4096,
    codec: Annotated[
        str | None, typer.Option("--codec", help="Of the experts: q4_0, q8_0, mxfp4, bf16, q4_k, …")
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            "--routing",
            help="seed, local, uniform, recorded. Default: recorded where it is, else seed.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", envvar="TIERRUN_DEVICE", help="auto, cpu, cuda.")
    ] = _DEFAULT.device,
    assume: Annotated[
        str | None,
        typer.Option("--assume", help="Another machine: drive=7GB/s,pcie=25GB/s,vram=1TB/s,…"),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine again; else once a day.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the last run of a store.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of --json, plan nothing.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say whether a model will run here, how fast, and what would help; nothing is loaded."""
    _set_up_logging(verbose)
    from rich.console import Console

    from tierrun.tools.plan import document

    if schema:
        kind = document.Check if check else document.Plan
        typer.echo(json.dumps(kind.model_json_schema(), indent=2))
        return
    from tierrun.tools.plan.checking import check_last_run
    from tierrun.tools.plan.making import make_plan
    from tierrun.tools.plan.render import render, render_check
    from tierrun.tools.plan.request import Request

    directories = named_directories(None, nvme_dir)
    source = model if model is not None else str(store_directories(None, nvme_dir)[0])
    request = Request(
        source, vram, ram, directories, context, codec, routing, device, assume, measure
    )
    if check:
        compared = check_last_run(request)
        said, text = compared.model_dump_json(indent=2), render_check(compared)
    else:
        plan = make_plan(request).plan
        said, text = plan.model_dump_json(indent=2), render(plan)
    if as_json:
        typer.echo(said)
    else:
        Console().print(text)


@app.command()
def demo(
    nvme_dir: Annotated[
        Path | None,
        typer.Option("--nvme-dir", help="Where its store goes. Default: the user's cache."),
    ] = None,
    predict: Annotated[int, typer.Option("-n", "--predict", help="Tokens per prompt.")] = 160,
    verbose: Verbose = False,
) -> None:
    """Convert the model that comes with tierrun and run it, a fifth of it in each tier."""
    _set_up_logging(verbose)
    from tierrun.tools.demo.run import run_demo

    run_demo(nvme_dir, predict)


def _print_listing(directories: list[Path], *, as_json: bool) -> None:
    from rich.console import Console

    from tierrun.io.store import Store
    from tierrun.tools import listing

    opened = Store.open(directories)
    if as_json:
        typer.echo(json.dumps(listing.as_json(opened)))
    else:
        Console().print(listing.listing(opened))


def _switch(flag: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise UsageError(f"{flag} is on or off, not {text!r}")
    return text == "on"


def _set_up_logging(verbose: bool) -> None:
    """Decisions and warnings to stderr, with -v details too; other libraries' warnings only."""
    logging.basicConfig(format="tierrun: %(message)s", level=logging.WARNING)
    logging.getLogger("tierrun").setLevel(logging.DEBUG if verbose else logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    """Entry point: run the command; one line and an exit code for whatever goes wrong."""
    group: Any = typer.main.get_command(app)
    options = [param for param in group.commands["run"].params if not getattr(param, "is_flag", 0)]
    takes_value = {name for param in options for name in param.opts if name.startswith("-")}
    commands = {name: getattr(each, "commands", ()) for name, each in group.commands.items()}
    argv = normalise(sys.argv[1:], commands, takes_value)
    try:
        sys.exit(app(argv, standalone_mode=False))
    except _ArgumentError as error:
        _fail(f"{error.format_message()} (tierrun {argv[0]} --help)", 2)
    except TierrunError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:  # `tierrun … | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'the operating system'}: {error.strerror or error}", 1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


_ArgumentError: Any = typer.BadParameter.__mro__[2]
"""click's ClickException, wherever this version of typer keeps its click."""


def _fail(message: str, exit_code: int) -> None:
    typer.echo(f"tierrun: {message}", err=True)
    sys.exit(exit_code)
