"""`tierrun bench store|model|pipeline|peers`: what a whole model does, and models to do it with."""

import time
from pathlib import Path
from typing import Annotated

import typer

from tierrun.engine.options import Options
from tierrun.io.errors import UsageError
from tierrun.tools.arguments import NvmeDir, StoreArgument, store_directories
from tierrun.tools.bench import CompareFile, CsvFile, Device, JsonFile, MdFile, PlotFile

_DEFAULT = Options()

Io = Annotated[str, typer.Option("--io", help="How shards are read: auto, direct, mmap, …")]
Threads = Annotated[
    int, typer.Option("-t", "--threads", min=0, help="0: all cores; torch one less.")
]


def add_model_commands(app: typer.Typer) -> None:
    """Add them to `app`."""
    app.command("store")(bench_store)
    app.command("model")(bench_model)
    app.command("pipeline")(bench_pipeline)
    app.command("peers")(bench_peers)


def bench_store(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Gets the store; the directory is made.")
    ],
    like: Annotated[
        str, typer.Option("--like", help="Whose dimensions; 'list' lists them.")
    ] = "qwen3.6-35b-a3b",
    codec: Annotated[
        str | None,
        typer.Option("--codec", help="Of the experts: q4_k, q8_0, bf16, … Default: as usual."),
    ] = None,
    resident_codec: Annotated[
        str, typer.Option("--resident-codec", help="Of attention and output head.")
    ] = "q4_k",
    routing: Annotated[
        str,
        typer.Option(
            "--routing",
            help="seed: skewed, and local in time; local: flat in the long run; uniform: neither.",
        ),
    ] = "seed",
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Instead of the model's.")
    ] = None,
    experts: Annotated[int | None, typer.Option("--experts", min=1, help="Per layer.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Experts per token.")] = None,
    hidden: Annotated[int | None, typer.Option("--hidden", min=2, help="Hidden size.")] = None,
    intermediate: Annotated[
        int | None, typer.Option("--intermediate", min=1, help="An expert's size.")
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option("--vocabulary", min=2, help="Tokens known.")
    ] = None,
    sigma: Annotated[
        float | None, typer.Option("--sigma", min=0.0, help="Skew of the experts' popularity.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of all weights.")] = 0,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Also as GGUF and, in bf16, as checkpoint: for bench peers."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a store that is there.")] = False,
    tokens: Annotated[
        int, typer.Option("--tokens", min=0, help="Prompt that counts the skew; 0: none.")
    ] = 0,
) -> None:
    """Make a synthetic store with a real model's dimensions, as fast as the disk takes it."""
    from tierrun.bench.report import open_console
    from tierrun.bench.synthetic_models import Asked, find_routing
    from tierrun.bench.synthetic_models import describe as describe_models

    console = open_console()
    if like == "list":
        console.print(describe_models(), highlight=False, markup=False)
        return
    asked = Asked(like, layers, experts, top_k, hidden, intermediate, vocabulary, sigma)
    way = find_routing(routing)
    name, shape, usual = asked.resolve(way)
    if peers and resident_codec != "q4_k":
        raise UsageError("--peers: resident matrices are in --codec too; leave --resident-codec")
    from tierrun.bench.synthetic import PERCENTS, PeerFiles, build_for_peers, skew
    from tierrun.bench.synthetic_store import build_store
    from tierrun.io.extent import format_bytes

    started, chosen = time.perf_counter(), codec or usual
    if peers:
        manifest = build_for_peers(directory, shape, chosen, seed, force=force, routing=way)
    else:
        manifest = build_store(
            directory, shape, chosen, resident_codec, seed, force=force, name=name, routing=way
        )
    seconds = time.perf_counter() - started
    store = PeerFiles.under(directory).store if peers else directory
    nbytes = manifest.expert_bytes + manifest.resident_bytes
    console.print(
        f"{store}: like {name}, routing {way}, {manifest.num_experts} experts in {chosen}, "
        f"{format_bytes(manifest.expert_bytes)}, resident {format_bytes(manifest.resident_bytes)}, "
        f"{seconds:.1f} s, {nbytes / seconds / 1e9:.2f} GB/s",
        highlight=False,
    )
    if tokens:
        curve = skew(store, tokens, shape.vocabulary)
        parts = (f"{p:.0f} % {s:.0%}" for p, s in zip(PERCENTS, curve, strict=True))
        console.print(f"share of activations that the top experts take: {', '.join(parts)}")


def bench_model(
    store: StoreArgument = None,
    nvme_dir: NvmeDir = None,
    prompts: Annotated[
        str, typer.Option("-p", "--n-prompt", help="Tokens of prompts: 512,2048; 0: none.")
    ] = "512",
    generated: Annotated[
        str, typer.Option("-n", "--n-gen", help="Tokens generated: 128; 0: none.")
    ] = "128",
    depths: Annotated[
        str, typer.Option("-d", "--n-depth", help="Tokens of context before: 0,4096.")
    ] = "0",
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", min=1, help="Of each test.")
    ] = 5,
    vram: Annotated[
        str, typer.Option("--vram", help="Hot tiers: auto,8GiB,20%experts (of their bytes).")
    ] = "auto",
    ram: Annotated[
        str, typer.Option("--ram", help="Warm tiers, the same; every pair is measured.")
    ] = "auto",
    device: Device = "auto",
    io: Io = "auto",
    threads: Threads = 0,
    ubatch: Annotated[
        int, typer.Option("-ub", "--ubatch-size", min=0, help="Tokens of a prompt; 0: chosen.")
    ] = 0,
    lanes: Annotated[
        str, typer.Option("--lanes", help="Experts in RAM, beside a GPU: auto, gpu, cpu.")
    ] = _DEFAULT.lanes,
    policy: Annotated[str, typer.Option("--policy", help="rates, lfru, lru, layers.")] = "rates",
    exact: Annotated[bool, typer.Option("--exact", help="The same bits for any budget.")] = False,
    learn: Annotated[
        int, typer.Option("--learn", min=0, help="Tokens decoded before the tests.")
    ] = 128,
    no_warmup: Annotated[
        bool, typer.Option("--no-warmup", help="Nothing before the first repetition.")
    ] = False,
    duration: Annotated[
        float | None,
        typer.Option("--duration", help="Seconds of each test; no repetition begins later."),
    ] = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    md_file: MdFile = None,
    plot_file: PlotFile = None,
    compare: CompareFile = None,
) -> None:
    """llama-bench's tests on a store, with where experts came from and how near the bound is."""
    directories = store_directories(store, nvme_dir)
    from tierrun.bench.model_plan import Plan

    plan = Plan.of(
        prompts, generated, depths, vram, ram, repetitions, learn, not no_warmup, duration
    )
    from tierrun.bench.devices import Setting
    from tierrun.bench.ending import ended_by_signals
    from tierrun.bench.model_plots import plot_model
    from tierrun.bench.model_run import Request, device_of, run_model
    from tierrun.bench.outputs import Outputs
    from tierrun.bench.report import open_console

    outputs = Outputs(json_file, csv_file, md_file, plot_file, compare)
    old = outputs.check()
    setting = Setting(
        device_of(device),
        exact=exact,
        ubatch=ubatch,
        io=io,
        threads=threads,
        lanes=lanes,
        policy=policy,
    )
    with ended_by_signals():
        found = run_model(Request(tuple(directories), plan, setting))
    outputs.deliver(found.results, found.sheets, open_console(), old, plot_model)
    if found.ended is not None:
        raise found.ended


def bench_pipeline(
    store: StoreArgument = None,
    nvme_dir: NvmeDir = None,
    size: Annotated[
        str, typer.Option("--size", help="Of the experts that are asked for, from all layers.")
    ] = "2GiB",
    vram: Annotated[
        str | None, typer.Option("--vram", help="Hot tier: 512MiB. Default: an eighth of --size.")
    ] = None,
    ram: Annotated[
        str | None, typer.Option("--ram", help="Warm tier: 512MiB. Default: an eighth of --size.")
    ] = None,
    device: Device = "auto",
    io: Io = "auto",
    depth: Annotated[
        int | None, typer.Option("--depth", min=1, help="Reads in flight per directory.")
    ] = None,
    duration: Annotated[float, typer.Option("--duration", help="Seconds of each round.")] = 2.0,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of each path and load.")] = 5,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    md_file: MdFile = None,
    plot_file: PlotFile = None,
    compare: CompareFile = None,
) -> None:
    """How fast experts come from drive to RAM to VRAM as the engine moves them, and the bound."""
    directories = store_directories(store, nvme_dir)
    from tierrun.io.extent import parse_bytes

    nbytes = parse_bytes(size)
    hot, warm = (None if text is None else parse_bytes(text) for text in (vram, ram))
    if duration <= 0:
        raise UsageError(f"--duration {duration:g}: give some time, such as 2")
    import torch

    from tierrun.bench.ending import ended_by_signals
    from tierrun.bench.model_run import device_of
    from tierrun.bench.outputs import Outputs
    from tierrun.bench.pipeline_plots import plot_pipeline
    from tierrun.bench.pipeline_run import Request, run_pipeline
    from tierrun.bench.report import open_console
    from tierrun.io.reads import DEFAULT_DEPTH

    outputs = Outputs(json_file, csv_file, md_file, plot_file, compare)
    old = outputs.check()
    where = torch.device(device_of(device))
    options = Options(device=str(where), io=io, depth=depth or DEFAULT_DEPTH)
    request = Request(tuple(directories), where, options, nbytes, hot, warm, rounds, duration)
    with ended_by_signals():
        results, sheets = run_pipeline(request)
    outputs.deliver(results, sheets, open_console(), old, plot_pipeline)


def bench_peers(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="From `tierrun bench store DIR --peers`.")
    ],
    llama_bench: Annotated[
        Path | None, typer.Option("--llama-bench", help="llama.cpp's program of that name.")
    ] = None,
    llama_args: Annotated[
        list[str] | None,
        typer.Option("--llama-args", help="Its further arguments; repeat it for several arms."),
    ] = None,
    tierrun_args: Annotated[
        list[str] | None,
        typer.Option("--tierrun-args", help="Of tierrun, likewise: '--threads 2'."),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            "--arms",
            help="tierrun, tierrun-blind (no look-ahead), llama.cpp, accelerate, "
            "accelerate-experts. Default: all that can run.",
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Cap of every arm: 2GiB (root). Default: none.")
    ] = None,
    ram: Annotated[
        str, typer.Option("--ram", help="Experts in RAM; accelerate's max_memory.")
    ] = "1GiB",
    vram: Annotated[str, typer.Option("--vram", help="Experts in VRAM, of tierrun.")] = "auto",
    device: Device = "cpu",
    tokens: Annotated[int, typer.Option("-n", "--n-gen", min=1, help="Tokens generated.")] = 32,
    prompt: Annotated[
        int, typer.Option("-p", "--n-prompt", min=0, help="Tokens of a prompt; 0: none.")
    ] = 0,
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, help="Tokens before the generated ones.")
    ] = 32,
    accelerate_tokens: Annotated[
        int, typer.Option("--accelerate-tokens", min=1, help="Generated by accelerate: it is slow.")
    ] = 4,
    threads: Threads = 0,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds of one run.")] = 600.0,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Of all arms.")] = 3,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    md_file: MdFile = None,
    compare: CompareFile = None,
) -> None:
    """tierrun beside llama.cpp and accelerate: same weights, same memory cap, in turns."""
    from tierrun.bench.cgroup import obstacle
    from tierrun.bench.ending import ended_by_signals
    from tierrun.bench.model_run import device_of
    from tierrun.bench.outputs import Outputs
    from tierrun.bench.peers import run_peers
    from tierrun.bench.peers_setting import Setting
    from tierrun.bench.report import open_console
    from tierrun.io.extent import parse_bytes

    outputs = Outputs(json_file, csv_file, md_file, None, compare)
    old = outputs.check()
    if memory is not None and (reason := obstacle()) is not None:
        raise UsageError(f"--memory {memory}: {reason}")
    setting = Setting(
        directory,
        None if memory is None else parse_bytes(memory),
        ram,
        vram,
        device_of(device),
        warmup,
        tokens,
        prompt,
        accelerate_tokens,
        threads,
        timeout,
        llama_bench,
        tuple(llama_args or [""]),
        tuple(tierrun_args or [""]),
        None if arms is None else tuple(word.strip() for word in arms.split(",")),
    )
    with ended_by_signals():
        found = run_peers(setting, rounds)
    outputs.deliver(found.results, found.sheets, open_console(), old)
    if found.ended is not None:
        raise found.ended
