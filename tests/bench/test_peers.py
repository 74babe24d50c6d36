"""`tierrun bench peers`: the arms, how each is run, and what becomes of one that dies."""

import json
import sys
from pathlib import Path

import pytest
from tests.bench.conftest import Run, refused

from tierrun.bench import peers_arms
from tierrun.bench.cgroup import obstacle
from tierrun.bench.checkpoint import Shape
from tierrun.bench.documents import read_document
from tierrun.bench.peers_arms import Arm, Killed, Output, Setting, arms_of, parse_llama, run_capped
from tierrun.bench.synthetic import build_for_peers
from tierrun.bench.synthetic_models import Routing
from tierrun.io.errors import TierrunError, UsageError

SHAPE = Shape(2, 8, 2, 64, 32, heads=4, kv_heads=2, head_dim=16, vocabulary=128)

LLAMA = """#!{python}
import json, sys
words = sys.argv[1:]
value = lambda flag: int(words[words.index(flag) + 1])
rows = [dict(n_prompt=value("-p"), n_gen=0, samples_ts=[5.0, 20.0])] if value("-p") else []
rows += [dict(n_prompt=0, n_gen=value("-n"), samples_ts=[0.5, 1.0 + words.count("--fast")])]
print("a line that is no JSON")
print(json.dumps(rows))
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
    path.write_text(LLAMA.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def _warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_arms, "drop_caches", lambda: None)


def test_which_arms_there_are(model: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [arm.name for arm in arms_of(Setting(model))] == [
        *("tierrun", "tierrun-blind", "accelerate", "accelerate-experts")
    ]
    both = Setting(model, llama_bench=llama, llama_arguments=("", "--fast"), arms=("llama.cpp",))
    assert [arm.name for arm in arms_of(both)] == ["llama.cpp", "llama.cpp --fast"]
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


def test_the_last_repetition_counts() -> None:
    rows = [
        {"n_prompt": 512, "n_gen": 0, "samples_ts": [1.0, 60.0]},
        {"n_prompt": 0, "n_gen": 32, "samples_ts": [1.0, 44.0]},
    ]
    ran = parse_llama(Output(f"noise\n{json.dumps(rows)}", 7, 2.0))
    assert ran.tests == {"pp512": (60.0, 7, 2.0), "tg32": (44.0, 7, 2.0)}
    for text in ("", "[{}]", '[{"n_gen": 1, "samples_ts": []}]'):
        with pytest.raises(TierrunError, match="no results that are known"):
            parse_llama(Output(text, 0, 0.0))


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_an_arm_that_fails_is_named_with_its_last_word(model: Path) -> None:
    fails = _python("import sys; print('first', file=sys.stderr); sys.exit('the reason')")
    with pytest.raises(TierrunError, match="foo ended with 1: the reason"):
        run_capped("foo", fails, Setting(model))


def test_an_arm_without_end_is_ended(model: Path) -> None:
    with pytest.raises(Killed, match="not done after 0 s"):
        run_capped("foo", _python("import time; time.sleep(60)"), Setting(model, seconds=0.2))


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
        def run(self, setting: Setting) -> peers_arms.Ran:
            raise Killed("killed for want of memory")

    make = peers_arms._llama

    def made(arguments: str) -> Arm:
        arm = make(arguments)
        return Dies(arm.name, arm.command, arm.parse) if arguments else arm

    monkeypatch.setattr(peers_arms, "_llama", made)
    file = tmp_path / "peers.json"
    numbers = ("-n", 4, "-p", 8, "--warmup", 2, "--accelerate-tokens", 1, "--rounds", 1)
    arms = ("--arms", "tierrun,llama.cpp,accelerate-experts")
    peers = ("--llama-bench", llama, "--llama-args", "", "--llama-args", "--fast")
    code, printed, error = run(
        "peers", model, *numbers, *arms, *peers, "--ram", "64KiB", "--json", file
    )
    assert code == 0, error
    assert "tg: tierrun / llama.cpp: " in printed
    assert "llama.cpp --fast: killed for want of memory" in printed
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
    assert results.details["killed"] == {"llama.cpp --fast": "killed for want of memory"}
    assert not (model / "offload").exists()
    code, printed, error = run("compare", file, file)
    assert code == 0 and "too few rounds" in printed, error


def test_refusals_are_one_line(run: Run, tmp_path: Path, model: Path) -> None:
    assert "has no store" in refused(run, "peers", tmp_path)
    assert "--arms foo" in refused(run, "peers", model, "--arms", "foo")
    assert "foo" in refused(run, "peers", model, "--memory", "foo")
