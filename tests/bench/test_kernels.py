"""`tierrun bench kernels`: what is chosen, computed and said; the GPU's kernels interpreted."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tierrun.bench import kernels_bench, kernels_compile, kernels_run
from tierrun.bench.kernels_bench import Bench, Yardstick, measure_all
from tierrun.bench.kernels_calls import Calls, Routed
from tierrun.bench.kernels_cpu import cpu_calls, cpu_work, obstacle
from tierrun.bench.kernels_errors import errors, exact_output, sheet_of_errors
from tierrun.bench.kernels_gpu import gpu_calls, gpu_work, kernel_of
from tierrun.bench.kernels_layers import (
    LAYERS,
    Layer,
    Record,
    choose,
    fill,
    make_record,
    parse_layer,
    record_nbytes,
)
from tierrun.bench.kernels_plan import ALL_CODECS, USUAL_CODECS, Case, Plan, largest_record
from tierrun.engine.codecs import codec as codecs
from tierrun.engine.codecs.weight import matrix_view, widened
from tierrun.io.errors import UsageError
from tierrun.tools import cli

EXPERTS, MATRIX = Layer("experts", 64, 32, 6, 2), Layer("matrix", 64, 96)
FEW, SMALL = Layer("few", 32, 32, 4, 2), Layer("small", 32, 32)
"""For the interpreter, which needs milliseconds for each program of a kernel."""


def filled(layer: Layer, codec: str, count: int = 8) -> tuple[Record, torch.Tensor]:
    """A record, and memory with `count` of it; only those of whole pages are."""
    record = make_record(layer, codec)
    return record, fill(torch.zeros(count * len(record.data), dtype=torch.uint8), record)


def expected(record: Record, routed: Routed) -> torch.Tensor:
    """What calls give, from the exact weights, fp64: all records are the same."""
    matrices = [widened(matrix_view(record.data, m)).double() for m in record.matrices]
    x = routed.x.double().repeat_interleave(routed.top_k.shape[1], dim=0)
    first = x @ matrices[0].T
    if not record.layer.experts:
        return first
    gate, up = first.chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up) @ matrices[1].T


def assert_right(calls: Calls, record: Record, tolerance: float) -> None:
    for number in (0, 1):
        calls.output.fill_(torch.nan)
        calls(number)
        wanted = expected(record, calls.routed)
        error = (calls.output.cpu().double() - wanted).norm() / wanted.norm()
        assert error < tolerance, error


# -- layers and codecs ------------------------------------------------------------------------


def test_every_codec_is_there() -> None:
    assert set(ALL_CODECS) >= {codec.name for codec in codecs._NAMED}
    assert set(USUAL_CODECS) < set(ALL_CODECS) and len(set(ALL_CODECS)) == len(ALL_CODECS)
    for codec in ALL_CODECS:
        assert record_nbytes(EXPERTS, codec) == len(make_record(EXPERTS, codec).data)


def test_layers_by_name_and_by_dimensions() -> None:
    assert parse_layer("glm-5") is LAYERS["glm-5"]
    assert parse_layer("2048x512:8/256")[1:] == LAYERS["qwen3.6-35b-a3b"][1:]
    assert parse_layer("4096x14336")[1:] == (4096, 14336, 0, 0)
    assert parse_layer("64x32:2/6").weights == 3 * 64 * 32
    assert MATRIX.flops(5) == 2 * 5 * 64 * 96 and EXPERTS.flops(5) == 2 * 5 * 2 * 3 * 64 * 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"layers": "gpt-2"}, "--layers gpt-2: name granite"),
        ({"layers": "100x64"}, "multiples of 32"),
        ({"layers": "64x0"}, "multiples of 32"),
        ({"layers": "64x32:9/8"}, "top-k is from 1"),
        ({"layers": "64x32:0/8"}, "top-k is from 1"),
        ({"codecs": "q9_z"}, "--codecs q9_z: choose from bf16"),
        ({"kernels": "compiled"}, "--kernels compiled: choose from int8, fp32, expand"),
        ({"tokens": "0"}, "--tokens '0'"),
        ({"tokens": "1,many"}, "--tokens 'many'"),
        ({"threads": "x"}, "--threads 'x'"),
        ({"seconds": -1.0}, "--duration -1"),
    ],
)
def test_words_that_are_not_understood(words: dict[str, Any], message: str) -> None:
    names = ("layers", "codecs", "kernels", "tokens", "threads", "seconds")
    asked = dict.fromkeys(names, None) | words
    with pytest.raises(UsageError, match=message):
        Plan.of(**asked, cached=False, full=False, rounds=1)


def test_what_is_measured() -> None:
    usual, full = Plan().cases(("cpu", "cuda")), Plan(full=True).cases(("cpu", "cuda"))
    assert {case.codec for case in full} == set(ALL_CODECS)
    assert {case.kernel for case in usual if case.device == "cuda"} == {"matvec", "matmul"}
    assert {case.kernel for case in usual if case.device == "cpu"} == {"int8", "fp32", "expand"}
    assert {case.source for case in usual} == {"memory"}
    assert all(case.threads is None for case in usual if case.device == "cuda")
    assert Plan.of(None, "all", None, None, None, False, False, 1, None).codecs == ALL_CODECS
    matrix = Plan(layers=(MATRIX,), tokens=(1,)).cases(("cpu",))
    assert {case.kernel for case in matrix} == {"int8", "expand"}
    asked = Plan.of("64x32:2/6", "q4_k", "int8,fp32", "1", "1", True, False, 1, None)
    cases = asked.cases(("cpu",))
    assert [(case.kernel, case.source) for case in cases] == [
        *(("int8", "memory"), ("int8", "cache"), ("fp32", "memory"), ("fp32", "cache"))
    ]
    assert {case.key()["from"] for case in cases} == {"memory", "cache"}
    assert largest_record(matrix) == record_nbytes(MATRIX, "bf16") == 3 * 4096
    assert Plan(seconds=0.5).seconds_of(10**6) == 0.5


# -- calls ------------------------------------------------------------------------------------


@given(
    tokens=st.integers(1, 40),
    count=st.integers(1, 20),
    top_k=st.integers(1, 4),
    more=st.integers(0, 9),
)
def test_calls_go_through_all_records(tokens: int, count: int, top_k: int, more: int) -> None:
    layer = Layer("any", 32, 32, top_k + more, top_k)
    record = Record(layer, "q8_0", torch.zeros(4096, dtype=torch.uint8), ())
    routed = Routed(record, torch.zeros(count, 4096, dtype=torch.uint8), tokens)
    taken = [place for number in range(5) for place in routed.places(number)]
    assert taken == [i % count for i in range(5 * len(routed.experts))]
    assert torch.equal(routed.experts[routed.which].view(tokens, top_k), routed.top_k)
    assert all(len(set(row)) == top_k for row in choose(layer, tokens).tolist())
    assert torch.equal(routed.top_k, choose(layer, tokens))
    assert routed.weights == len(routed.experts) * layer.weights


@pytest.mark.parametrize("codec", ALL_CODECS)
@pytest.mark.parametrize("layer", [EXPERTS, MATRIX], ids=lambda layer: str(layer.name))
def test_expanding_calls_are_right(codec: str, layer: Layer) -> None:
    record, records = filled(layer, codec)
    assert_right(cpu_calls("expand", record, records, 5, 1), record, 1e-5)


@pytest.mark.parametrize(
    ("kernel", "layer", "codec", "tolerance"),
    [
        ("fp32", EXPERTS, "q4_k", 1e-4),
        ("fp32", EXPERTS, "bf16", 1e-4),
        ("int8", EXPERTS, "q4_k", 0.03),
        ("int8", EXPERTS, "q8_0", 0.03),
        ("int8", MATRIX, "q4_k", 0.03),
    ],
    ids=str,
)
def test_compiled_calls_are_right(kernel: str, layer: Layer, codec: str, tolerance: float) -> None:
    record, records = filled(layer, codec)
    calls = cpu_calls(kernel, record, records, tokens=5, threads=2)
    assert_right(calls, record, tolerance)
    assert cpu_work(calls)(3) > 0
    exact = expected(record, calls.routed)
    error = (calls.output.double() - exact).norm() / exact.norm()
    assert (error > 1e-3) == (kernel == "int8"), "not the kernel that was named"


@pytest.mark.parametrize(
    ("layer", "codec", "kernel", "tokens", "reason"),
    [
        (EXPERTS, "q4_k", "int8", 8, None),
        (MATRIX, "q4_k", "int8", 8, None),
        (EXPERTS, "q4_k", "int8", 9, None),
        (MATRIX, "q4_k", "int8", 9, None),
        (EXPERTS, "bf16", "int8", 1, "plain numbers"),
        (MATRIX, "bf16", "int8", 1, "plain numbers"),
        (EXPERTS, "fp8_g128_f32", "int8", 1, "some are fractions"),
        (EXPERTS, "bf16", "fp32", 9, None),
        (MATRIX, "q4_k", "fp32", 1, "not for one matrix"),
        (MATRIX, "bf16", "expand", 9, None),
    ],
    ids=str,
)
def test_what_the_cpu_has_no_kernel_for(
    layer: Layer, codec: str, kernel: str, tokens: int, reason: str | None
) -> None:
    found = obstacle(Case("cpu", layer, codec, kernel, tokens, 1))
    assert (found is None) == (reason is None) and (reason or "") in (found or "")


@pytest.mark.parametrize("layer", [EXPERTS, MATRIX], ids=lambda layer: str(layer.name))
def test_a_cached_call_is_of_one_expert(layer: Layer) -> None:
    """Whose record is always the same; and its work is that of one expert for every token."""
    bench = Bench(torch.zeros(1 << 20, dtype=torch.uint8), gpu=False)
    case = Case("cpu", layer, "q4_0", "int8", 3, 1, "cache")
    calls, per_second = bench._measured(case, 0.001)
    assert calls.routed.weights == layer.weights and per_second > 0
    assert calls.routed.flops == 2 * 3 * layer.weights
    assert [calls.routed.places(number) for number in range(3)] == [[0]] * 3
    assert calls.routed.which.tolist() == [0, 0, 0]


def test_errors_of_every_kernel() -> None:
    cases = Plan(layers=(EXPERTS, MATRIX), codecs=("q4_k", "bf16"), tokens=(1, 2)).cases(("cpu",))
    cases = [case for case in cases if obstacle(case) is None]
    found = list(errors(cases))
    assert [(e.layer, e.codec, e.kernel) for e in found] == list(
        dict.fromkeys((case.layer.name, case.codec, case.kernel) for case in cases)
    )
    for error in found:
        low, high = (1e-3, 0.03) if error.kernel == "int8" else (0.0, 1e-5)
        assert low <= error.error < high, error
    sheet = sheet_of_errors(found)
    assert sheet.columns == ("layer", "codec", "int8", "fp32", "expand")
    assert [row[2] == "-" for row in sheet.rows] == [False, True, False, True]
    assert sheet.rows[2][3] == "-", "a matrix has no kernel in fp32 but that which expands"
    one = sheet_of_errors([error for error in found if error.layer == "matrix"][:1])
    assert one.columns == ("codec", "int8")


def test_the_exact_output_is_the_expected_one() -> None:
    for layer in (EXPERTS, MATRIX):
        record = make_record(layer, "q5_k").alone
        routed = Routed(record, record.data[None], 4)
        assert torch.allclose(exact_output(record, routed), expected(record, routed))


@pytest.mark.parametrize("codec", ["q4_k", "bf16"])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("layer", [FEW, SMALL], ids=lambda layer: str(layer.name))
def test_the_gpus_calls_are_right(codec: str, tokens: int, layer: Layer) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record, records = filled(layer, codec, count=13)
    calls, count = gpu_calls(record, records.to(device), tokens)
    assert count == max(1, 13 // len(calls.routed.experts))
    assert_right(calls, record, 1e-5 if kernel_of(tokens) == "matvec" else 2e-3)


def test_a_graphs_time_is_shared_by_its_calls() -> None:
    called = list[int]()
    work = gpu_work(called.append, 4, torch.device("cpu"))
    assert work(1) > 0 and called == [0, 1, 2, 3]
    work(6)
    assert called[4:] == [0, 1, 2, 3] * 2


# -- rounds -----------------------------------------------------------------------------------


def test_shares_are_of_the_rounds_own_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([Yardstick(1e9, 1e12), Yardstick(2e9, 4e12)])
    monkeypatch.setattr(Bench, "yardstick", lambda self, threads, seconds: next(found))
    bench = Bench(torch.zeros(1 << 20, dtype=torch.uint8), gpu=False)
    case = Case("cpu", EXPERTS, "q8_0", "expand", 3, 1)
    (cell,) = measure_all(bench, [case], 2, 0.001, lambda number, case: None).cells
    samples = cell.samples
    for sample, memory, flops in ((0, 1e9, 1e12), (1, 2e9, 4e12)):
        assert samples["of_memory"][sample] == pytest.approx(samples["bandwidth"][sample] / memory)
        assert samples["of_product"][sample] == pytest.approx(samples["flops"][sample] / flops)
        rate = 1 / samples["seconds"][sample]
        assert samples["flops"][sample] == pytest.approx(EXPERTS.flops(3) * rate)
    record = make_record(EXPERTS, "q8_0")
    distinct = len(choose(EXPERTS, 3).unique())
    nbytes = samples["bandwidth"][0] * samples["seconds"][0]
    assert nbytes == pytest.approx(distinct * record.packed_bytes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted only without a GPU")
def test_the_gpus_kernels_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way of a GPU's cells, in host memory."""
    monkeypatch.setattr(kernels_bench, "_GPU_SIDE", 64)
    bench = Bench(torch.zeros(1 << 13, dtype=torch.uint8), gpu=True)
    cases = [
        *Plan(layers=(SMALL,), codecs=("q4_0",), tokens=(1, 9)).cases(("cuda",)),
        *Plan(layers=(FEW,), codecs=("q4_0",), tokens=(9,)).cases(("cuda",)),
    ]
    found = measure_all(bench, cases, 1, 0.0, lambda number, case: None)
    assert [cell.key["kernel"] for cell in found.cells] == ["matvec", "matmul", "matmul"]
    assert all(cell.samples["bandwidth"][0] > 0 for cell in found.cells)
    assert found.yardsticks[None][0].memory > 0 and found.yardsticks[None][0].flops > 0


def test_what_does_not_compile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = Plan(layers=(EXPERTS,), codecs=("q4_0", "q8_0"), tokens=(1,)).cases(("cuda",))

    def compile_all(asked: list[Case]) -> dict[Case, str]:
        return {case: "CompilationError: no" for case in asked if case.codec == "q8_0"}

    monkeypatch.setattr(kernels_compile, "compile_all", compile_all)
    left, notes = kernels_run._possible(cases, {"cuda": "cuda:1"})
    assert left == [cases[0]] and notes == ["left out (1 cell): CompilationError: no"]
    with pytest.raises(UsageError, match="nothing can be measured"):
        kernels_run._possible(cases[1:], {"cuda": "cuda:1"})


def test_a_kernel_that_fails_says_why() -> None:
    case = Case("cuda:77", EXPERTS, "q4_0", "matvec", 1)
    (why,) = kernels_compile.compile_all([case]).values()
    assert "\n" not in why and "Error" in why


# -- the command ------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`tierrun bench kernels` with some arguments: exit code, stdout, stderr."""
    monkeypatch.setattr(kernels_run, "more_than_cached", lambda cache, times: 1 << 20)
    monkeypatch.setattr(kernels_bench, "_CPU_SIDE", 64)

    def bench(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tierrun", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code, printed = ended.value.code, capsys.readouterr()
        return code if isinstance(code, int) else 0, printed.out, printed.err

    return bench


QUICK = (
    *("kernels", "--device", "cpu", "--layers", "64x32:2/6,64x96", "--codecs", "q4_k,bf16"),
    *("--tokens", "1,3", "--threads", "1", "--duration", "0.002", "--rounds", "4"),
)


def test_end_to_end(run: Run, tmp_path: Path) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    files = ("--csv", tmp_path / "t.csv", "--md", tmp_path / "t.md")
    code, printed, error = run(*QUICK, "--json", old, *files)
    assert code == 0, error
    assert "% of memory" in printed and "memory is read at" in printed
    made = json.loads(old.read_text())
    experts, matrices = 2 * (3 + 2), 2 * (2 + 1)  # bf16 has no int8
    assert made["benchmark"] == "kernels" and len(made["cells"]) == experts + matrices
    assert {error["kernel"] for error in made["details"]["errors"]} == {"int8", "fp32", "expand"}
    assert "left out (4 cells): int8: plain numbers" in printed
    assert "outputs' error by kernel" in printed
    assert all(len(samples) == 4 for c in made["cells"] for samples in c["samples"].values())
    assert len(made["details"]["yardsticks"]["cpu"][0]["memory"]) == 4
    assert "q4_k" in (tmp_path / "t.md").read_text()
    assert (
        (tmp_path / "t.csv")
        .read_text()
        .startswith("device,layer,codec,kernel,tokens,threads,from,")
    )
    code, printed, error = run(*QUICK, "--json", new, "--compare", old)
    assert code == 0 and "verdict" in printed, error
    code, printed, error = run("compare", old, new, "--metric", "flops")
    assert code == 0 and "TFLOP/s: median" in printed, error


def test_from_a_cache(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "cached.json"
    code, printed, error = run(*QUICK, "--kernels", "int8", "--cached", "--json", file)
    assert code == 0 and "from cache: always the same expert" in printed, error
    keys = [cell["key"] for cell in json.loads(file.read_text())["cells"]]
    assert {(key["kernel"], key["codec"]) for key in keys} == {("int8", "q4_k")}
    assert sorted(key["from"] for key in keys) == ["cache"] * 4 + ["memory"] * 4


def test_a_plot(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, _, error = run(*QUICK, "--plot", tmp_path / "plot.png")
    assert code == 0, error
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_refusals_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> str:
        code, printed, error = run(*QUICK, *arguments)
        assert code in (1, 2) and printed == ""
        assert error.startswith("tierrun: ") and error.count("\n") == 1
        return error

    assert "--codecs foo" in refused("--codecs", "foo")
    assert "choose auto, cpu" in refused("--device", "tpu")
    if not torch.cuda.is_available():
        assert "--device cuda" in refused("--device", "cuda")
    monkeypatch.setattr(kernels_run, "more_than_cached", lambda cache, times: 1 << 50)
    assert "more than half of the" in refused()
