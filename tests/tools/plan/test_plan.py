"""`tierrun plan` as a user calls it."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.checkpoints import tiny_checkpoint

from tierrun.engine.engine import load
from tierrun.io.errors import BudgetError, CheckpointError, ModelError, UsageError
from tierrun.io.store import Store
from tierrun.tools.cli import main
from tierrun.tools.convert import convert
from tierrun.tools.generate import Request as Generate
from tierrun.tools.generate import complete
from tierrun.tools.lastrun import LastRun, recall
from tierrun.tools.plan.checking import check_last_run
from tierrun.tools.plan.document import Check, Plan
from tierrun.tools.plan.making import make_plan
from tierrun.tools.plan.request import Request

MACHINE = "drive=3GB/s,memory=20GB/s,cpu=5GB/s,cpu_flops=80GFLOP/s,overhead=1ms"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    return tiny_checkpoint("qwen3_moe", directory, dtype=torch.bfloat16)


@pytest.fixture
def store(checkpoint: Path, tmp_path: Path) -> Path:
    convert(checkpoint, tmp_path / "store")
    return tmp_path / "store"


def request(source: Path | str, **options: object) -> Request:
    asked = Request(str(source), ram="4MiB", device="cpu", assume=MACHINE)
    return replace(asked, **options)  # type: ignore[arg-type]


def made(source: Path | str, **options: object) -> Plan:
    plan = make_plan(request(source, **options)).plan
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    return plan


def test_one_model_is_the_same_in_every_form(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    config = tmp_path / "its-config.json"
    config.write_bytes((checkpoint / "config.json").read_bytes())
    plans = [made(source) for source in (checkpoint, store, config)]
    assert [plan.model.kind for plan in plans] == ["checkpoint", "store", "configuration"]
    for plan in plans:
        assert plan.model.expert_bytes == plans[0].model.expert_bytes
        assert plan.model.resident_bytes == plans[0].model.resident_bytes
        assert plan.decode == plans[0].decode
        assert plan.model.kv_bytes_per_1k == 2 * 2 * 2 * 16 * 1024 * 4  # keys, values; fp32


def test_hit_rates_and_codecs(checkpoint: Path) -> None:
    plan = made(checkpoint, ram="40KiB", codec="q4_0")
    assert sum(tier.hit_rate for tier in plan.tiers) == pytest.approx(1)
    sizes = {row.codec: row.expert_bytes for row in plan.codecs}
    assert list(sizes) == ["bf16", "q4_0", "q8_0", "mxfp4"]
    assert plan.model.codec == "q4_0"
    assert plan.model.expert_bytes == sizes["q4_0"] < sizes["bf16"]


def test_another_machine_with_a_gpu(checkpoint: Path) -> None:
    assume = f"{MACHINE},pcie=25GB/s,vram=1000GB/s"
    plan = made(checkpoint, assume=assume, device="auto", vram="40KiB", ram="1MiB")
    assert plan.device == "gpu"
    assert plan.tiers[0].hit_rate > 0
    assert {"overhead", "vram"} <= plan.decode.seconds.keys()
    assert not any("drive" in note for note in plan.notes)
    small = made(checkpoint, assume=assume, device="auto", vram="40KiB", ram="40KiB")
    assert any("best case" in note for note in small.notes)
    with pytest.raises(UsageError, match="--vram auto: the assumed GPU's size"):
        make_plan(request(checkpoint, assume=assume, device="auto"))
    with pytest.raises(UsageError, match="--device cpu is not one"):
        make_plan(request(checkpoint, assume=assume, device="cpu"))
    with pytest.raises(UsageError, match="--ram 0"):
        make_plan(request(checkpoint, assume=assume, device="auto", vram="1MiB", ram="0"))


def test_what_is_too_small_says_what_works(checkpoint: Path) -> None:
    with pytest.raises(BudgetError, match="smallest budget that works is (\\d+) bytes"):
        make_plan(request(checkpoint, ram="4KiB"))
    least = made(checkpoint).model.smallest_budget
    assert made(checkpoint, ram=str(least)).tiers[1].nbytes == least


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        make_plan(request(tmp_path / "nowhere"))
    dense = tmp_path / "dense.json"
    dense.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match="is a dense model"):
        make_plan(request(dense))
    dense.write_text(json.dumps({"model_type": "nobody_knows"}))
    with pytest.raises(ModelError, match="cannot build"):
        make_plan(request(dense))
    dense.write_text("{")
    with pytest.raises(CheckpointError, match="dense.json cannot be used"):
        make_plan(request(dense))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no config.json"):
        make_plan(request(tmp_path / "empty"))


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object) -> str:
        raise OSError("We couldn't connect\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        CheckpointError, match="^some/model: .* its config.json: We couldn't connect$"
    ):
        make_plan(request("some/model"))


def test_without_a_drive_it_is_said_how_to_have_it_measured(checkpoint: Path) -> None:
    assume = MACHINE.replace("drive=3GB/s,", "")
    rates = {rate.name: rate for rate in made(checkpoint, assume=assume).rates}
    assert rates["drive"].value == 3e9
    assert rates["drive"].source == "assumed: PCIe 3; --nvme-dir DIR measures the drive of DIR"


def test_what_is_not_known_is_a_range(checkpoint: Path, store: Path) -> None:
    among = made(checkpoint, ram="40KiB").decode.among
    assert among is not None
    speeds = [
        made(checkpoint, ram="40KiB", routing=name).decode for name in ("seed", "local", "uniform")
    ]
    assert [speed.among for speed in speeds] == [None] * 3
    found = [speed.tokens_per_second for speed in speeds]
    assert (among.least, among.most) == (min(found), max(found))
    assert among.least < among.most
    assert made(checkpoint).decode.among is None  # all in memory


def test_a_run_is_compared_with_its_prediction(store: Path) -> None:
    with pytest.raises(UsageError, match="no record of a run"):
        check_last_run(request(store))
    with load(store, ram="64KiB", device="cpu") as engine:
        sampling = engine.defaults.sampling(temperature=0)
        complete(engine, [1, 2, 3], Generate(20, sampling, ignore_eos=True), as_json=True)
        opened = engine.store
    run = recall(opened)
    assert (run.tokens, run.prompt_tokens, run.hot) == (19, 3, 0)
    assert run.warm + run.cold == 19 * 2 * 2
    check = check_last_run(request(store))
    assert check.plan.tiers[1].nbytes == run.warm_bytes
    assert check.plan.context == 23
    speed, with_its_hits, *_ = check.rows
    assert speed.measured == with_its_hits.measured == pytest.approx(19 / run.seconds)
    assert speed.predicted != with_its_hits.predicted
    assert Check.model_validate_json(check.model_dump_json()) == check


def test_only_a_store_can_be_checked(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="is not a store"):
        check_last_run(request(checkpoint))


def test_a_damaged_record_is_one_line(store: Path) -> None:
    opened, path = Store.open([store]), store / "usage.run.json"
    fields = {name: 1 for name in LastRun.__dataclass_fields__}
    good = fields | dict(fingerprint=opened.manifest.fingerprint, when="now", device="cpu")
    for text, words in (
        ("{", "cannot be used"),
        ("{}", "cannot be used"),
        (json.dumps(good | {"seconds": "long"}), "cannot be used"),
        (json.dumps(good), "says nothing"),
        (json.dumps(good | {"tokens": 9, "fingerprint": "other"}), "of another model"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=words) as caught:
            recall(opened)
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps(good | {"tokens": 9}))
    assert recall(opened).tokens == 9


@pytest.fixture
def tierrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of a command."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TIERRUN_NVME_DIR", raising=False)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tierrun", "plan", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


Command = Callable[..., tuple[int, str, str]]


def test_the_command(checkpoint: Path, tierrun: Command) -> None:
    words = [str(checkpoint), "--ram", "4MiB", "--device", "cpu", "--assume", MACHINE]
    code, document, _ = tierrun(*words, "--json")
    assert code == 0
    assert Plan.model_validate_json(document).model.top_k == 2
    assert "where the time goes" in tierrun(*words)[1]
    assert json.loads(tierrun("--schema")[1])["title"] == "Plan"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["/nowhere"], 1),
        (["CHECKPOINT", "--assume", "disk=1"], 2),
        (["CHECKPOINT", "--ram", "4KiB", "--assume", MACHINE], 2),
        (["CHECKPOINT", "--routing", "odd", "--assume", MACHINE], 2),
        (["CHECKPOINT", "--codec", "q9", "--assume", MACHINE], 1),
        (["CHECKPOINT", "--context", "0"], 2),
        ([], 2),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], code: int, checkpoint: Path, tierrun: Command
) -> None:
    found = [str(checkpoint) if word == "CHECKPOINT" else word for word in words]
    ended, out, error = tierrun(*found)
    assert (ended, out, len(error.splitlines())) == (code, "", 1), error
    assert error.startswith("tierrun: ")
