"""The GPU's benchmarks at toy size on the CPU: that they run and what they say adds up."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tierrun.bench import alternation, devices, gpu_arbiter, gpu_decode, gpu_parity, gpu_soak
from tierrun.bench.alternation import Turn, domain_stream
from tierrun.bench.devices import Setting, budget, bytes_per_token
from tierrun.bench.gpu_parity import Workers
from tierrun.bench.gpu_soak import Look, Soak
from tierrun.bench.parity_rows import STEPS, Case, Errors, Row, Seen, relative_error, run_case
from tierrun.io.errors import TierrunError, UsageError
from tierrun.io.store import Store
from tierrun.tiers.ledger import Counters


def last_document(captured: pytest.CaptureFixture[str]) -> dict[str, object]:
    document: dict[str, object] = json.loads(captured.readouterr().out.splitlines()[-1])
    return document


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_CPU_PROBE_BYTES", 1 << 20)


def test_budgets_may_be_shares_of_the_experts(synthetic: Path) -> None:
    manifest = Store.open([synthetic / "store"]).manifest
    assert budget("25%experts", manifest) == str(manifest.expert_bytes // 4)
    assert budget("200%experts", manifest) == str(2 * manifest.expert_bytes)
    assert [budget(text, manifest) for text in ("auto", "50%", "1GiB")] == ["auto", "50%", "1GiB"]


def test_bytes_of_a_token(synthetic: Path) -> None:
    manifest = Store.open([synthetic / "store"]).manifest
    embedding = 512 * 64 * 2
    experts = 2 * 2 * manifest.classes[0].nbytes
    assert bytes_per_token(manifest) == manifest.resident_bytes - embedding + experts


def test_decode(
    synthetic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], small_probe: None
) -> None:
    def run(expected: Path | None, **sizes: int) -> None:
        gpu_decode.main(
            synthetic / "store",
            device="cpu",
            vram="20%experts",
            ram="50%experts",
            tokens_out=tmp_path / "ours.json",
            tokens_expected=expected,
            json_file=tmp_path / "decode.json",
            **sizes,
        )

    sizes = {"tokens": 6, "warmup": 2, "rounds": 2, "prompt": 12, "learn": 60, "prefill": 24}
    run(None, **sizes)
    (tmp_path / "theirs.json").write_text((tmp_path / "ours.json").read_text())
    run(tmp_path / "theirs.json", **sizes)
    last = json.loads((tmp_path / "decode.json").read_text())
    assert last == last_document(capsys)
    assert [len(r["steps"]) for r in last["rounds"]] == [6, 6]
    counters = last["rounds"][0]["counters"]
    assert counters["hot"] + counters["warm"] + counters["cold"] == 6 * 2 * 2
    assert len(last["learning_hot_shares"]) == len(last["prefill_tokens_per_second"]) == 2
    assert 0 < last["share_of_bound"]["median"] < 1
    (tmp_path / "theirs.json").write_text("[1, 2, 3]")
    with pytest.raises(TierrunError, match="tokens differ"):
        run(tmp_path / "theirs.json", **sizes)


def test_soak(synthetic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = synthetic / "store"
    gpu_soak.main(store, "cpu", "10%experts", "50%experts", tokens=40, settle=10, every=10)
    last = last_document(capsys)
    assert last["integrity_checks"] == 41
    assert [look["tokens"] for look in last["looks"]] == [10, 20, 30, 40]  # type: ignore[attr-defined]
    assert last["logits_error"] == 0.0 and last["faults"] == []


def test_soak_ends_in_time(synthetic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_soak.main(synthetic / "store", "cpu", "10%experts", "50%experts", seconds=0.0)
    assert last_document(capsys)["integrity_checks"] == 1


def test_soak_says_what_grew() -> None:
    looks = [Look(n, 1.0, {"rss_anonymous": n << 20, "rss": 9 << 30}, Counters()) for n in (1, 90)]
    done = Soak(looks, checks=2, logits_error=1e-4)
    assert gpu_soak.faults(done, 32 << 20, exact=True) == [
        "rss_anonymous grew by 89.0 MiB",
        "the logits changed by 0.0001",
    ]
    assert gpu_soak.faults(done, 1 << 30, exact=False) == []


def test_soak_of_contexts_in_turn(synthetic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_soak.main(
        synthetic / "store",
        "cpu",
        "10%experts",
        "50%experts",
        contexts="12,40",
        answer=4,
        seconds=4,
    )
    last = last_document(capsys)
    turns = last["turns"]
    assert isinstance(turns, list) and len(turns) > 5
    assert [(t["context"], t["domain"]) for t in turns[:4]] == [(12, 0), (40, 1), (12, 2), (40, 0)]
    assert last["integrity_checks"] == 4 * len(turns)
    assert last["logits_error"] == 0.0 and last["faults"] == []


@pytest.mark.parametrize("contexts", ["long", "64,2048"])
def test_contexts_that_make_no_sense_are_refused(contexts: str) -> None:
    with pytest.raises(UsageError, match="--contexts"):
        gpu_soak.main(Path("."), "cpu", contexts=contexts)


def test_domains_share_no_token() -> None:
    streams = [set(domain_stream(5000, 100, domain, 3)) for domain in range(3)]
    assert not (streams[0] & streams[1] or streams[1] & streams[2] or streams[0] & streams[2])
    assert max(max(stream) for stream in streams) < 100
    assert len(domain_stream(5000, 100, 1, 3)) == 5000


def test_contexts_of_one_length_are_compared_with_each_other() -> None:
    sizes = [(8, 1), (64, 9), (8, 3), (64, 9), (8, 3), (64, 9), (8, 40)]
    turns = [Turn(context, 0, 1.0, {"pinned": size << 20, "rss": 0}) for context, size in sizes]
    assert alternation.growth(turns, 8) == {"pinned": 37 << 20, "rss": 0}
    assert alternation.faults(turns, (8, 64), 32 << 20) == [
        "pinned grew by 37.0 MiB from one context of 8 to another"
    ]
    assert "too few contexts of 64" in alternation.faults(turns[:4], (64,), 1)[0]


def test_of_many_contexts_the_trend_counts_and_not_the_worst() -> None:
    def growth(per_turn: float) -> int:
        sizes = [
            int((700 + (number * 37 % 40) + per_turn * number) * (1 << 20)) for number in range(100)
        ]
        turns = [Turn(8, 0, 1.0, {"rss": size}) for size in sizes]
        return alternation.growth(turns, 8)["rss"] >> 20

    assert abs(growth(0.0)) <= 2, "40 MiB up and down"
    assert growth(0.5) >= 32, "a leak of 50 MiB"


def test_arbiter(synthetic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_arbiter.main(
        synthetic / "store", "cpu", "10%experts", "50%experts", context=48, decoded=4, ubatch=16
    )
    last = last_document(capsys)
    stages = last["stages"]
    assert isinstance(stages, list)
    assert [(stage["name"], stage["tokens"]) for stage in stages] == [
        ("short", 24),
        ("grows", 48),
        ("short again", 24),
    ]
    assert last["said"] == last["faults"] == []


def test_arbiter_says_what_did_not_change_hands() -> None:
    def stages(*sizes: int) -> list[gpu_arbiter.Stage]:
        return [gpu_arbiter.Stage("", 1, 0.0, 0.0, {"experts": size << 30}) for size in sizes]

    assert gpu_arbiter.faults(stages(8, 6, 8)) == []
    assert gpu_arbiter.faults(stages(8, 8, 8)) == [
        "the experts gave nothing: ask for a smaller --card"
    ]
    assert gpu_arbiter.faults(stages(8, 6, 7)) == ["the experts regained 7.00 GiB of 8.00 GiB"]


CPU = Setting("cpu", vram="50%experts", ram="1GiB", context=256)


@pytest.mark.parametrize("case", [Case("qwen3_moe"), Case("qwen3_moe", "q4_k")])
def test_parity_of_the_cpu_with_itself(case: Case) -> None:
    row = run_case(case, CPU)
    assert row.failures == {}
    assert set(row.arms.values()) == {Errors(0.0, 0.0)}
    assert ("compiled" in row.arms) == (case.codec is None)
    assert row.same_tokens and row.cpu_tokens == STEPS
    assert row.passed(0.0)


def test_parity_tells_what_fails_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    row = run_case(Case("no_such_model"), CPU)
    assert set(row.failures) == {"store"} and not row.passed(1.0)
    row = run_case(Case("qwen3_moe"), Setting("cpu", vram="nonsense"))
    assert set(row.failures) == {"default", "exact", "eager", "compiled"}
    assert "nonsense" in row.failures["eager"]
    assert "Traceback" in capsys.readouterr().err


def test_parity_outlives_a_hung_process() -> None:
    workers = Workers(patience=0.01)
    row = workers.row(Case("qwen3_moe"), CPU)
    workers.close()
    assert row.poisoned and "hung" in row.failures["process"]


def test_parity_end_to_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # as `python -m` does, for `tests`
    gpu_parity.main(device="cpu", only="qwen3_moe mxfp4,mixtral")
    rows = last_document(capsys)["rows"]
    assert [row["case"] for row in rows] == [["qwen3_moe", "mxfp4"], ["mixtral", None]]  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="choose among mixtral"):
        gpu_parity.main(device="cpu", only="gpt2")


def test_a_turned_choice_is_told_apart() -> None:
    chosen = torch.tensor([[0, 1], [2, 3], [0, 2]])
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    truth = Seen(logits, logits[:1], [], "", chosen)
    ours = Seen(logits.flip(0), logits[:1] * 1.01, [], "", torch.tensor([[0, 1], [2, 7], [0, 2]]))
    prompt, steps = ours.same_choices(truth)
    assert prompt.tolist() == [True, False] and steps.tolist() == [True]
    assert ours.steady(truth).decode == pytest.approx(0.01)


def test_verdicts() -> None:
    good = Row(Case("olmoe"), steady=Errors(1e-3, 2e-3), same_tokens=True)
    assert good.passed(2e-3) and not good.passed(1e-3)
    assert not replace(good, same_tokens=False).passed(1.0)
    assert not Row(Case("olmoe")).passed(1.0)
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said() -> None:
    with pytest.raises(UsageError, match="--device cpu tries it out"):
        gpu_soak.main(Path("."))
