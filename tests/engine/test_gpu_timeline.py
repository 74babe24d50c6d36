"""What a prompt leaves on the timeline of a device; kernels are interpreted where there is none."""

from collections.abc import Callable

import torch
from tests.clocks import CountingClock
from tests.engine.conftest import PROMPT, Model
from tests.engine.test_gpu_engine import CUDA, PREFILL, load

from tierrun.engine.gpu.clock import CudaClock
from tierrun.io.timeline import ASIDE, EXPERTS, REST, SEGMENTS, UP, Clock, Span, Timeline


def test_a_prompt_is_experts_and_the_rest_in_turn(model_of: Callable[[str], Model]) -> None:
    model = model_of("gpt_oss")
    clock: Clock = CudaClock(torch.device("cuda")) if CUDA else CountingClock()
    with load(model, vram=str(model.expert_bytes // 2)) as engine:
        session, layers = engine.session(), range(len(engine.store.manifest.layers))
        session.prefill(PROMPT[:PREFILL])
        session.reset()
        before = engine.ledger.snapshot()
        with Timeline(clock) as timeline:
            session.prefill(PROMPT[:PREFILL])
        promoted = (engine.ledger.snapshot() - before).promoted_bytes
    compute = [span for span in timeline.spans if span.track in (EXPERTS, REST, SEGMENTS)]
    assert all(a.end <= b.start for a, b in zip(compute, compute[1:], strict=False))
    rest = [span.name for span in compute if span.track == REST]
    assert rest == [f"layer {n}: before its experts" for n in layers] + ["after the last experts"]
    groups = [layer_of(span) for span in compute if span.track == EXPERTS]
    assert groups == sorted(groups) and set(groups) == set(layers)
    copied = sum(span.nbytes for span in timeline.spans if span.track in (UP, ASIDE))
    assert copied == (promoted if CUDA else 0)


def layer_of(span: Span) -> int:
    layer, _, what = span.name.partition(": ")
    assert layer.startswith("layer ") and what.endswith(" experts")
    return int(layer.removeprefix("layer "))
