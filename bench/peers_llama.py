"""llama.cpp in `tierrun bench peers`: how llama-bench is run, and what it prints.

Known from builds of 2026: `-o json` prints an array with an object for each test, each repetition's
tokens per second in `samples_ts`. Flags differ between builds, so only those are given that all
have (`-m -p -n -r -t -o`).
"""

import json
import os
import shlex
from typing import Any

from tierrun.bench.peers_process import Output
from tierrun.bench.peers_runs import Measured, Ran
from tierrun.bench.peers_setting import Setting
from tierrun.io.errors import TierrunError

_ROUNDS = 2
"""Repetitions within llama-bench; the last one counts, the others fill the page cache."""

_ABOUT = (
    *("build_commit", "build_number", "backends", "model_type", "model_size"),
    *("n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "flash_attn"),
    *("load_mode", "use_mmap", "repack", "poll", "n_gpu_layers", "n_cpu_moe"),
)
"""What of its own account is kept, where a build gives it: how it was built and set up."""


def obstacle(setting: Setting) -> str | None:
    """Why it cannot be run, or None."""
    program = setting.llama_bench
    if program is None:
        return "give --llama-bench PROGRAM"
    if not os.access(program, os.X_OK) or program.is_dir():
        return f"{program} is not a program"
    if not setting.files.gguf.is_file():
        return f"{setting.directory} has no model.gguf: make it with bench store --peers"
    return None


def command(setting: Setting, arguments: str) -> list[str]:
    """llama-bench with the setting's tests and further `arguments`."""
    assert setting.llama_bench is not None, "there is an obstacle otherwise"
    files = [str(setting.llama_bench.absolute()), "-m", str(setting.files.gguf)]
    numbers = ["-p", str(setting.prompt), "-n", str(setting.tokens), "-r", str(_ROUNDS)]
    threads = ["-t", str(setting.threads)] if setting.threads else []
    return [*files, *numbers, *threads, "-o", "json", *shlex.split(arguments)]


def parse(output: Output) -> Ran:
    """Of each test the last repetition.

    Raises:
        TierrunError: it is not llama-bench's JSON, or several results of one test.
    """
    tests: dict[str, Measured] = {}
    try:
        rows = json.loads(output.text[output.text.index("[") :])
        for row in rows:
            name, speed = _test(row), float(row["samples_ts"][-1])
            if name in tests:
                raise TierrunError(
                    f"llama-bench gave several results of {name}: give each value an arm of its "
                    "own, by repeating --llama-args"
                )
            tests[name] = Measured(speed, output.peak_bytes, output.seconds)
        about = {name: rows[0][name] for name in _ABOUT if name in rows[0]}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise TierrunError(f"llama-bench printed no results that are known ({error!r})") from None
    return Ran(tests, output.peak_bytes, about=about)


def _test(row: dict[str, Any]) -> str:
    """As llama-bench calls it in its tables: `pp512`, `tg64`, `pp512+tg64`, `tg64 @ d512`."""
    parts = [f"{kind}{row[key]}" for kind, key in (("pp", "n_prompt"), ("tg", "n_gen")) if row[key]]
    depth = f" @ d{row['n_depth']}" if row.get("n_depth") else ""
    return "+".join(parts) + depth
