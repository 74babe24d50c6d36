"""Chunks of prompts that fit: chosen, as asked, or smaller; and said."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.conftest import PROMPT, Model, convert
from tests.engine.models import save_runnable

from tierrun.engine import session
from tierrun.engine.engine import Engine
from tierrun.engine.gpu import backend
from tierrun.engine.gpu.backend import GpuBackend
from tierrun.engine.gpu.cache import GrowingCache
from tierrun.engine.gpu.chunks import ChunkChooser, Experts, Settled
from tierrun.engine.gpu.context import DeviceRunner
from tierrun.engine.gpu.experts import DEVICE_EXPERTS
from tierrun.engine.gpu.gauge import Gauge, NoGauge
from tierrun.engine.gpu.rates import measure_rates
from tierrun.engine.gpu.workspace import Estimate, Measured, Workspace, Workspaces
from tierrun.engine.kernels.cpu import CpuKernels
from tierrun.engine.model import load_model
from tierrun.engine.options import Options
from tierrun.engine.resident import ResidentWeights
from tierrun.io.errors import BudgetError
from tierrun.io.store import Store
from tierrun.tiers.budget import DeviceFigures
from tierrun.tiers.chunking import Rates

MIB, GIB = 1 << 20, 1 << 30
EXPERTS = Experts(16 * GIB, 16 * MIB, 64 * GIB)
RATES = Rates(upload=25e9, drive=3e9, tokens=6000.0)

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels")


class FakeDevice:
    """Gauge and trials: a chunk takes `per_token` bytes for each token, an estimate says less."""

    interpreted = False

    def __init__(self, free: int, per_token: int = MIB, estimated: float = 1.0) -> None:
        self.free, self.per_token, self.estimated = free, per_token, estimated
        self.tried, self.estimates = list[int](), 0

    def figures(self) -> DeviceFigures:
        return DeviceFigures(24 * GIB, self.free, "a GPU")

    def peak(self, work: Callable[[], object]) -> int:
        raise NotImplementedError

    def measure(self, chunk: int) -> Measured:
        self.tried.append(chunk)
        if chunk * self.per_token > self.free:
            raise torch.OutOfMemoryError
        return Measured(GrowingCache(), Workspace(chunk * self.per_token))

    def estimate(self, sizes: Sequence[int]) -> Estimate:
        self.estimates += 1
        taken = {size: int(self.estimated * size * self.per_token) for size in sizes}
        return Estimate(taken, self.figures())

    def release(self) -> None:
        pass


def settle(device: FakeDevice, capacity: int = 8192, **options: Any) -> Settled:
    given = Options(**options)
    return ChunkChooser(given, capacity, EXPERTS, device, device, lambda: RATES).settle()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[tuple[str, str]]]]:
    """Level and text of what was said about chunks."""
    with caplog.at_level(logging.INFO, "tierrun"):
        yield lambda: [
            (record.levelname, record.getMessage())
            for record in caplog.records
            if "chunk" in record.getMessage()
        ]


Said = Callable[[], list[tuple[str, str]]]


def test_it_is_chosen_by_bandwidths_and_tried_once(said: Said) -> None:
    device = FakeDevice(20 * GIB, per_token=MIB // 4)
    assert settle(device, vram="4GiB").tokens == 4096
    assert device.tried == [4096] and device.estimates == 1
    [(level, text)] = said()
    assert level == "INFO"
    assert text == (
        "prompts in chunks of 4096: computing takes 683 ms, moving 12.00 GiB of experts 515 ms "
        "(25.0 GB/s)"
    )


def test_where_all_experts_fit_it_is_what_fills_the_kernels(said: Said) -> None:
    assert settle(FakeDevice(20 * GIB, per_token=MIB // 4)).tokens == 2048
    assert said()[0][1].endswith("all 16.00 GiB of experts are in VRAM")


def test_a_wrong_estimate_costs_a_try(said: Said) -> None:
    device = FakeDevice(20 * GIB, estimated=0.1)
    assert settle(device, vram="4GiB").tokens == 2048
    assert device.tried == [4096, 2048]
    assert said() == [("INFO", "prompts in chunks of 2048: 4096 took too much VRAM")]


def test_one_that_was_asked_for_is_made_as_it_is(said: Said) -> None:
    device = FakeDevice(20 * GIB)
    assert settle(device, ubatch=8000, vram="4GiB").tokens == 8000
    assert device.tried == [8000] and not device.estimates
    assert said() == [("INFO", "prompts in chunks of 8000: as asked")]


@pytest.mark.parametrize(
    ("free", "vram", "tried"),
    [
        (5 * GIB, "auto", [8192, 4096]),  # the first runs out of memory
        (5 * GIB, "4GiB", [8192, 4096, 2048, 1024]),
        (9 * GIB, "4GiB", [8192, 4096]),
        (550 * MIB, "16MiB", [8192, 4096, 2048, 1024, 512]),
        (530 * MIB, "auto", [8192, 4096, 2048, 1024, 512]),
    ],
)
def test_one_that_was_asked_for_and_does_not_fit_is_halved_with_one_warning(
    free: int, vram: str, tried: list[int], said: Said
) -> None:
    if vram == "auto":
        free += 24 * GIB * 3 // 100
    device = FakeDevice(free)
    assert settle(device, ubatch=8192, vram=vram).tokens == tried[-1]
    assert device.tried == tried
    assert said() == [
        (
            "WARNING",
            f"-ub 8192 does not fit into VRAM beside the experts: prompts in chunks of {tried[-1]}",
        )
    ]


def test_a_budget_that_never_fits_is_not_the_chunks_fault() -> None:
    device = FakeDevice(8 * GIB)
    assert settle(device, ubatch=4096, vram="30GiB").tokens == 4096
    assert device.tried == [4096]


def test_with_exact_it_does_not_depend_on_budgets(said: Said) -> None:
    chunks = {
        settle(FakeDevice(free * GIB), vram=vram, exact=True).tokens
        for free in (5, 20)
        for vram in ("auto", "4GiB", "1GiB")
    }
    assert chunks == {2048}
    assert set(said()) == {
        ("INFO", "prompts in chunks of 2048: --exact, whatever the budgets"),
        (
            "WARNING",
            "--exact: prompts stay in chunks of 2048, which leaves too little VRAM for the "
            "experts; a smaller one (-ub) takes less",
        ),
    }
    assert settle(FakeDevice(20 * GIB), 600, exact=True).tokens == 600
    assert settle(FakeDevice(20 * GIB), exact=True, ubatch=64).tokens == 64
    with pytest.raises(torch.OutOfMemoryError):
        settle(FakeDevice(GIB), exact=True)


@pytest.mark.parametrize(("capacity", "chunk"), [(1, 1), (5, 5), (300, 300), (700, 512)])
def test_a_tiny_context_is_one_chunk(capacity: int, chunk: int) -> None:
    device = FakeDevice(20 * GIB)
    assert settle(device, capacity, vram="4GiB").tokens == chunk
    assert not device.estimates
    assert settle(FakeDevice(20 * GIB), capacity, ubatch=8192).tokens == capacity


def test_where_nothing_fits_the_memory_has_run_out() -> None:
    device = FakeDevice(10 * MIB)
    with pytest.raises(torch.OutOfMemoryError):
        settle(device, ubatch=100)
    assert device.tried == [100, 50, 25, 16]


@given(
    st.integers(0, 24 * GIB),
    st.integers(1, 8 * MIB),
    st.floats(0, 2),
    st.integers(1, 20000),
    st.integers(0, 10000),
    st.sampled_from(["auto", "4GiB", "30%", "0"]),
)
def test_whatever_is_settled_was_measured_and_fits(
    free: int, per_token: int, estimated: float, capacity: int, ubatch: int, vram: str
) -> None:
    device = FakeDevice(free, per_token, estimated)
    try:
        tokens, measured = settle(device, capacity, ubatch=ubatch, vram=vram)
    except torch.OutOfMemoryError:
        assert min(capacity, 16) * per_token > free or ubatch and min(ubatch, 16) * per_token > free
        return
    assert device.tried[-1] == tokens <= capacity and device.tried == sorted(device.tried)[::-1]
    assert measured.workspace.nbytes == tokens * per_token <= free
    assert tokens <= (ubatch or 8192)


# -- measuring -----------------------------------------------------------------------------------


class CountingGauge:
    """A pass takes 1000 bytes for each of its tokens, and 5; the first of all much more."""

    interpreted = False

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = list[int]()
        monkeypatch.setattr(DeviceRunner, "forward", self._forward)

    def _forward(self, tokens: Sequence[int], *, last_only: bool) -> None:
        self.passes.append(len(tokens))

    def figures(self) -> DeviceFigures:
        return DeviceFigures(GIB, GIB, "counted")

    def peak(self, work: Callable[[], object]) -> int:
        work()
        return 1000 * self.passes[-1] + 5 + (len(self.passes) == 1) * MIB


def workspaces(model: Model, capacity: int, gauge: Gauge) -> Workspaces:
    store = Store.open([model.store])
    loaded = load_model(store, ResidentWeights(store), CpuKernels(), experts=DEVICE_EXPERTS)
    device = torch.device("cpu")
    return Workspaces(loaded, store.manifest, device, capacity, 2048, gauge)


def test_large_chunks_are_estimated_by_three_small_passes(
    one_layer: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = CountingGauge(monkeypatch)
    it = workspaces(one_layer, 8192, gauge)
    taken, _ = it.estimate((512, 1024, 4096))
    assert gauge.passes == [512, 512, 1024]
    experts = taken[1024] - (1000 * 1024 + 5)
    assert experts > 0
    assert taken[4096] == 1000 * 4096 + 5 + 4 * experts


def test_what_was_chosen_is_measured_whole(
    one_layer: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = CountingGauge(monkeypatch)
    it = workspaces(one_layer, 512, gauge)
    cache, workspace = it.measure(512)
    assert gauge.passes == [511, 1] and cache.room == 512
    assert workspace.nbytes > 511 * 1000 and workspace.per_position == 0.0


@pytest.mark.parametrize("words", ["CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_memory_that_ran_out_is_not_the_caches_fault(
    words: str, one_layer: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = workspaces(one_layer, 64, NoGauge())

    def fail(self: DeviceRunner, tokens: Sequence[int], *, last_only: bool) -> torch.Tensor:
        raise RuntimeError(words)

    monkeypatch.setattr(DeviceRunner, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        it.measure(64)


# -- the whole engine ----------------------------------------------------------------------------


class Metered:
    """A device with so many bytes free, on which passes take nothing but for the experts."""

    interpreted = False

    def __init__(self, free: int) -> None:
        self.free = free

    def figures(self) -> DeviceFigures:
        return DeviceFigures(24 * GIB, self.free, "metered")

    def peak(self, work: Callable[[], object]) -> int:
        work()
        return 0


class MeteredEngine(Engine):
    """On the CPU, kernels interpreted."""

    backend: GpuBackend
    gauge: Gauge | None = None
    capacity = 64

    def _make_backend(self, weights: Any) -> GpuBackend:
        given = self.store, weights, self.options, self.ledger, torch.device("cpu")
        return GpuBackend(*given, self.capacity, gauge=self.gauge)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("one_layer")
    sizes = dict(num_hidden_layers=1, vocab_size=48, max_position_embeddings=8192)
    save_runnable("qwen3_moe", directory / "checkpoint", **sizes)
    return convert("qwen3_moe", directory / "checkpoint", directory / "store")


def load(model: Model, gauge: Gauge | None, *, capacity: int = 64, **options: Any) -> MeteredEngine:
    class It(MeteredEngine):
        pass

    It.gauge, It.capacity = gauge, capacity
    given = Options(**{"ram": "1GiB", "device": "cpu", "vram": str(model.smallest)} | options)
    return It(Store.open([model.store]), given)


@interpreted
def test_an_engine_says_which_chunk_it_has_chosen(one_layer: Model, said: Said) -> None:
    with load(one_layer, None) as engine:
        assert engine.backend.chunk == 16
    with load(one_layer, Metered(GIB)) as engine:
        assert engine.backend.chunk == 64
    assert said() == [
        ("INFO", "prompts in chunks of 16: kernels are interpreted"),
        ("INFO", "prompts in chunks of 64: a context of 64 is no more than one"),
    ]


@interpreted
def test_an_engine_chooses_by_rates_and_memory(
    one_layer: Model, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = one_layer.expert_bytes - one_layer.smallest
    rates = Rates(upload=moved, drive=1e9, tokens=4000)
    monkeypatch.setattr(backend, "measure_rates", lambda *_: rates)
    gauge = CountingGauge(monkeypatch)
    with load(one_layer, gauge, capacity=8192) as engine:
        assert engine.backend.chunk == 4096
    assert gauge.passes == [512, 512, 1024, 4096, 1]
    [(level, text)] = said()
    assert level == "INFO"
    assert text.startswith("prompts in chunks of 4096: computing takes 1024 ms, moving ")
    assert " of experts 1000 ms (" in text


@interpreted
def test_an_engine_whose_chunk_does_not_fit_takes_a_smaller_one(
    one_layer: Model, said: Said
) -> None:
    with load(one_layer, Metered(GIB), ubatch=32) as engine:
        assert engine.backend.chunk == 32
    manifest = Store.open([one_layer.store]).manifest
    rows = sum(matrix.shape[0] for matrix in manifest.classes[0].matrices)
    needed = 32 * manifest.layers[0].top_k * 2 * 4 * rows
    gauge = Metered(one_layer.smallest + needed)
    with load(one_layer, gauge, ubatch=64) as engine:
        assert engine.backend.chunk == 32
        engine.session().prefill([token % 48 for token in PROMPT[:17]])
        engine.check_integrity()
    assert [level for level, _ in said()] == ["INFO", "WARNING"]
    with pytest.raises(BudgetError, match=f"works is {one_layer.smallest} bytes"):
        load(one_layer, gauge, ubatch=64, vram="1")


@interpreted
def test_a_context_that_comes_back_is_computed_again_in_chunks(one_layer: Model) -> None:
    tokens = [token % 48 for token in PROMPT]
    with load(one_layer, None, vram="1GiB") as engine:
        first, second = engine.session(), engine.session()
        first.prefill(tokens[:18])
        wanted = first.prefill(tokens[18:19])
        first.reset()
        first.prefill(tokens[:18])
        second.prefill(tokens[10:12])
        assert torch.allclose(first.prefill(tokens[18:19]), wanted, atol=1e-4)
        engine.check_integrity()


@interpreted
@pytest.mark.parametrize(("goes_on", "passes"), [(True, [16, 2, 1]), (False, [18, 1])])
def test_a_model_that_cannot_continue_computes_its_past_at_once(
    goes_on: bool, passes: list[int], one_layer: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (backend, session):
        monkeypatch.setattr(module, "continues", lambda _: goes_on)
    counted = list[int]()

    def forward(self: DeviceRunner, tokens: Sequence[int], *, last_only: bool) -> torch.Tensor:
        counted.append(len(tokens))
        return torch.zeros(1, 48)

    with load(one_layer, None, vram="1GiB") as engine:
        monkeypatch.setattr(DeviceRunner, "forward", forward)
        first, second = engine.session(), engine.session()
        first.prefill([1] * 18)
        second.prefill([1])
        counted.clear()
        first.prefill([1])
    assert counted == passes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_on_a_gpu_it_is_chosen_by_what_was_measured(one_layer: Model, said: Said) -> None:
    class Here(Engine):
        backend: GpuBackend

        def _make_backend(self, weights: Any) -> GpuBackend:
            given = self.store, weights, self.options, self.ledger, self.device, 8192
            return GpuBackend(*given)

    store = Store.open([one_layer.store])
    rates = measure_rates(store, torch.device("cuda"), 48)
    assert 1e9 < rates.upload < 1e12 and rates.tokens > 1e6
    prompt = [token % 48 for token in PROMPT] * 150
    for options in ({}, {"exact": True}):
        with Here(store, Options(ram="1GiB", **options)) as engine:  # type: ignore[arg-type]
            assert engine.backend.chunk == 2048
            assert torch.isfinite(engine.session().prefill(prompt)).all()
            engine.check_integrity()
    assert [level for level, _ in said()] == ["INFO", "INFO"]
