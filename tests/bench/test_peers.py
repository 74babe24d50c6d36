"""`tierrun bench peers`: the arms, how each is run, and what becomes of one that dies."""

import json
import sys
from pathlib import Path

import pytest
from tests.bench.conftest import Run, refused

from tierrun.bench import peers, peers_arms, peers_llama, peers_process
from tierrun.bench.cgroup import obstacle
from tierrun.bench.checkpoint import Shape
from tierrun.bench.documents import read_document
from tierrun.bench.peers_arms import Arm, arms_of
from tierrun.bench.peers_found import Found, ratios
from tierrun.bench.peers_process import Killed, Output, run_capped
from tierrun.bench.peers_runs import Measured, Ran
from tierrun.bench.peers_setting import Setting
from tierrun.bench.synthetic import build_for_peers
from tierrun.bench.synthetic_models import Routing
from tierrun.io.errors import TierrunError, UsageError

SHAPE = Shape(2, 8, 2, 64, 32, heads=4, kv_heads=2, head_dim=16, vocabulary=128)

RECORDED = Path(__file__).parents[1] / "fixtures" / "llama_bench.json"
"""What llama-bench 0c1e570 printed with `-p 16 -n 8 -r 2 -t 2 -o json`, the whole of its stdout."""

LLAMA = """#!{python}
import json, sys
words = sys.argv[1:]
value = lambda flag: int(words[words.index(flag) + 1])
if "--foo" in words:  # as it does with a flag that it does not know: usage on stdout
    print("usage: llama-bench [options]")
    sys.exit("error: invalid parameter for argument: --foo")
prompt, tokens = json.load(open({recorded!r}))
prompt |= dict(n_prompt=value("-p"), samples_ts=[5.0, 20.0])
tokens |= dict(n_gen=value("-n"), samples_ts=[0.5, 1.0], repack="--repack" not in words)
print(json.dumps([row for row in (prompt, tokens) if row["n_prompt"] or row["n_gen"]], indent=2))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("peers")
    build_for_peers(directory, SHAPE, "bf16")
    return directory


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A program that speaks as llama-bench does."""
    path = tmp_path / "llama-bench"
    path.write_text(LLAMA.format(python=sys.executable, recorded=str(RECORDED)))
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def _warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_process, "drop_caches", lambda: None)


def test_which_arms_there_are(model: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [arm.name for arm in arms_of(Setting(model))] == [
        *("tierrun", "tierrun-blind", "accelerate", "accelerate-experts")
    ]
    two = ("", "--repack 0")
    both = Setting(model, llama_bench=llama, llama_arguments=two, arms=("llama.cpp",))
    assert [arm.name for arm in arms_of(both)] == ["llama.cpp", "llama.cpp --repack 0"]
    ours = Setting(model, threads=1, tierrun_arguments=("", "--threads 2"), arms=("tierrun",))
    one, other = arms_of(ours)
    assert (one.name, other.name) == ("tierrun", "tierrun --threads 2")
    assert other.command(ours) == [*one.command(ours), "--threads", "2"]
    with pytest.raises(UsageError, match="--arms foo: choose from tierrun"):
        arms_of(Setting(model, arms=("foo",)))
    with pytest.raises(UsageError, match="llama.cpp: give --llama-bench"):
        arms_of(Setting(model, arms=("llama.cpp",)))
    with pytest.raises(UsageError, match="is not a program"):
        arms_of(Setting(model, llama_bench=model / "none"))
    with pytest.raises(UsageError, match="on the CPU only"):
        arms_of(Setting(model, device="cuda:0", arms=("accelerate",)))
    monkeypatch.setattr(peers_arms.importlib.util, "find_spec", lambda name: None)
    assert [arm.name for arm in arms_of(Setting(model))] == ["tierrun", "tierrun-blind"]


def test_what_is_missing_is_said(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(UsageError, match="has no store; make all forms"):
        arms_of(Setting(tmp_path))
    (tmp_path / "store").mkdir()
    with pytest.raises(UsageError, match="has no model.gguf"):
        arms_of(Setting(tmp_path, llama_bench=llama))
    with pytest.raises(UsageError, match="make the model with --codec bf16"):
        arms_of(Setting(tmp_path, arms=("accelerate",)))


def test_all_get_llama_benchs_kind_of_tokens(model: Path, llama: Path) -> None:
    assert Setting(model).stream is Routing.SEED
    setting = Setting(model, llama_bench=llama)
    ours = [arm for arm in arms_of(setting) if not arm.name.startswith("llama")]
    for arm in ours:
        words = arm.command(setting)
        assert words[words.index("--routing") + 1] == "uniform"


def test_what_llama_bench_prints() -> None:
    ran = peers_llama.parse(Output(RECORDED.read_text(), 7, 2.0))
    rows = json.loads(RECORDED.read_text())
    speeds = {name: measured.tokens_per_second for name, measured in ran.tests.items()}
    assert speeds == {"pp16": rows[0]["samples_ts"][1], "tg8": rows[1]["samples_ts"][1]}
    assert ran.tests["tg8"] == (rows[1]["samples_ts"][1], 7, 2.0)
    assert ran.about["build_commit"] == "0c1e570" and ran.about["repack"] is True


def test_the_last_repetition_counts() -> None:
    rows = [
        {"n_prompt": 512, "n_gen": 0, "samples_ts": [1.0, 60.0]},
        {"n_prompt": 0, "n_gen": 32, "samples_ts": [1.0, 44.0]},
        {"n_prompt": 8, "n_gen": 4, "n_depth": 16, "samples_ts": [3.0]},
    ]
    ran = peers_llama.parse(Output(f"noise\n{json.dumps(rows)}", 7, 2.0))
    speeds = {name: measured.tokens_per_second for name, measured in ran.tests.items()}
    assert speeds == {"pp512": 60.0, "tg32": 44.0, "pp8+tg4 @ d16": 3.0}
    for text in ("", "[", "[\n", "[]", "[{}]", '[{"n_gen": 1, "n_prompt": 0, "samples_ts": []}]'):
        with pytest.raises(TierrunError, match="no results that are known"):
            peers_llama.parse(Output(text, 0, 0.0))
    with pytest.raises(TierrunError, match="several results of pp512: .* repeating --llama-args"):
        peers_llama.parse(Output(json.dumps([rows[0], rows[0]]), 0, 0.0))


def test_ratios_are_of_the_medians_of_one_test() -> None:
    def runs(*speeds: float) -> list[Measured]:
        return [Measured(speed, 0, 0.0) for speed in speeds]

    found = Found(
        {
            ("tierrun", "tg4"): runs(3.0, 1.0, 2.0),
            ("tierrun --threads 2", "tg4"): runs(8.0),
            ("llama.cpp", "tg4"): runs(4.0, 4.0, 100.0),
            ("llama.cpp", "pp8"): runs(5.0),
            ("accelerate", "tg1"): runs(1.0),
        }
    )
    assert list(ratios(found)) == [
        ("tg", "tierrun / llama.cpp", 0.5),
        ("tg", "tierrun --threads 2 / llama.cpp", 2.0),
        ("tg", "tierrun / accelerate", 2.0),
        ("tg", "tierrun --threads 2 / accelerate", 8.0),
    ]


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_an_arm_that_fails_is_named_with_its_last_word(model: Path) -> None:
    fails = _python("import sys; print('first', file=sys.stderr); sys.exit('the reason')")
    with pytest.raises(TierrunError, match="foo ended with 1: the reason"):
        run_capped("foo", fails, Setting(model))
    crashes = _python("import os; os.kill(os.getpid(), 11)")
    with pytest.raises(TierrunError, match=r"foo crashed \(SIGSEGV\): no message"):
        run_capped("foo", crashes, Setting(model))


def test_an_arm_without_end_is_ended(model: Path) -> None:
    with pytest.raises(Killed, match="not done after 0 s"):
        run_capped("foo", _python("import time; time.sleep(60)"), Setting(model, seconds=0.2))


def test_the_peak_of_memory_is_its_own(model: Path) -> None:
    """And not that of who started it, which `wait4` counts too."""
    mine = bytearray(300 << 20)
    mine[::4096] = b"x" * len(mine[::4096])
    small = run_capped("foo", _python("import time; time.sleep(0.3)"), Setting(model))
    code = "x = bytearray(128 << 20); x[::4096] = x[::4096]; import time; time.sleep(0.3)"
    large = run_capped("foo", _python(code), Setting(model))
    assert 0 < small.peak_bytes < 100 << 20 < large.peak_bytes < 256 << 20


def test_what_others_compute_is_counted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = iter([100.0, 107.0])
    monkeypatch.setattr(peers_process, "_busy_seconds", lambda: next(busy))
    output = run_capped("foo", _python("import time; time.sleep(0.5)"), Setting(model))
    assert 7.0 - 0.5 < output.others_cores * output.seconds <= 7.0


@pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
def test_an_arm_without_memory_is_killed(model: Path) -> None:
    setting = Setting(model, memory=64 << 20)
    with pytest.raises(Killed, match="for want of memory in 64"):
        run_capped("foo", _python("x = bytearray(256 << 20); x[::4096] = x[::4096]"), setting)
    output = run_capped("foo", _python("print(1)"), setting)
    assert output.text == "1\n" and 0 < output.peak_bytes <= 64 << 20


def test_end_to_end(
    run: Run, model: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All arms; llama.cpp's second one is killed, which ends no other."""

    class Dies(Arm):
        def run(self, setting: Setting) -> tuple[Ran, Output]:
            raise Killed("killed for want of memory")

    make = peers_arms._llama

    def made(arguments: str) -> Arm:
        arm = make(arguments)
        return Dies(arm.name, arm.command, arm.parse) if arguments else arm

    monkeypatch.setattr(peers_arms, "_llama", made)
    monkeypatch.setattr(peers, "bandwidth_of", lambda store: 1e9)
    file = tmp_path / "peers.json"
    numbers = ("-n", 4, "-p", 8, "--warmup", 2, "--accelerate-tokens", 1, "--rounds", 1)
    arms = ("--arms", "tierrun,llama.cpp,accelerate-experts")
    llamas = ("--llama-bench", llama, "--llama-args", "", "--llama-args", "--repack 0")
    code, printed, error = run(
        "peers", model, *numbers, *arms, *llamas, "--ram", "64KiB", "--json", file
    )
    assert code == 0, error
    assert "tg: tierrun / llama.cpp: " in printed
    assert "llama.cpp --repack 0: killed for want of memory" in printed
    assert "a token of tierrun" in printed and "bound without foresight" in printed
    results = read_document(file).results
    assert {(c.key["arm"], c.key["test"]) for c in results.cells} == {
        *(("tierrun", "tg4"), ("tierrun", "pp8")),
        *(("llama.cpp", "tg4"), ("llama.cpp", "pp8")),
        ("accelerate-experts", "tg1"),
    }
    speeds = {(c.key["arm"], c.key["test"]): c.samples["tokens_per_second"] for c in results.cells}
    assert speeds["llama.cpp", "tg4"] == (1.0,) and speeds["llama.cpp", "pp8"] == (20.0,)
    ratio = speeds["tierrun", "tg4"][0] / 1.0
    assert f"tg: tierrun / llama.cpp: {ratio:.2f}" in printed
    assert results.details["killed"] == {"llama.cpp --repack 0": "killed for want of memory"}
    said = results.details["programs"]["llama.cpp"]
    assert said["build_commit"] == "0c1e570" and said["n_threads"] == 2
    assert results.details["ratios"]["tg: tierrun / llama.cpp"] == ratio
    assert set(results.details["others_cores"]) == {"tierrun", "llama.cpp", "accelerate-experts"}
    assert not (model / "offload").exists()
    code, printed, error = run("compare", file, file)
    assert code == 0 and "too few rounds" in printed, error


def test_who_is_told_to_end_gets_what_there_is(
    model: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ends(Arm):
        def run(self, setting: Setting) -> tuple[Ran, Output]:
            raise KeyboardInterrupt

    def arm(kind: type[Arm], name: str) -> Arm:
        return kind(name, lambda s: peers_llama.command(s, ""), peers_llama.parse)

    both = [arm(Arm, "llama.cpp"), arm(Ends, "llama.cpp --repack 0")]
    monkeypatch.setattr(peers, "arms_of", lambda setting: both)
    outcome = peers.run_peers(Setting(model, llama_bench=llama), 3)
    assert isinstance(outcome.ended, KeyboardInterrupt)
    assert [cell.key["arm"] for cell in outcome.results.cells] == ["llama.cpp"]
    assert any("told to end" in note for note in outcome.results.notes)
    monkeypatch.setattr(peers, "arms_of", lambda setting: both[1:])
    with pytest.raises(KeyboardInterrupt):
        peers.run_peers(Setting(model, llama_bench=llama), 3)


def test_refusals_are_one_line(run: Run, tmp_path: Path, model: Path, llama: Path) -> None:
    assert "has no store" in refused(run, "peers", tmp_path)
    assert "--arms foo" in refused(run, "peers", model, "--arms", "foo")
    assert "foo" in refused(run, "peers", model, "--memory", "foo")
    unknown = ("--llama-bench", llama, "--llama-args", "--foo", "--arms", "llama.cpp")
    code, _, error = run("peers", model, *unknown)
    assert code == 1
    assert "llama.cpp --foo ended with 1: error: invalid parameter for argument: --foo" in error
