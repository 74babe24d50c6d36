"""Answers on the terminal: one completion, or a conversation."""

import json
import logging
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from rich.console import Console

from tierrun.engine.engine import Engine
from tierrun.engine.experts import Interrupted
from tierrun.engine.sampling import Sampling
from tierrun.engine.session import Session
from tierrun.engine.text import encode, encode_chat
from tierrun.engine.tokens import TokenRecord
from tierrun.io.errors import TierrunError
from tierrun.tools.lastrun import remember
from tierrun.tools.report import Answer

log = logging.getLogger(__name__)

_UNLIMITED = 1 << 30


@dataclass(frozen=True, slots=True)
class Request:
    """How answers are made; `predict` −1 is up to the end of the context."""

    predict: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    fixed: tuple[int, ...] = ()


def complete(
    engine: Engine, prompt: str | Sequence[int], request: Request, *, as_json: bool
) -> Answer:
    """Continue `prompt` once, as it is made, and print what it cost."""
    ids = encode(engine.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    answer = answer_to(engine, ids, request, None if as_json else Console(), engine.session())
    remember(engine, answer)
    if as_json:
        write_raw(Console(), json.dumps(answer.record(), indent=1) + "\n")
    return answer


def chat(engine: Engine, request: Request) -> None:
    """Converse until Ctrl-D or `/exit`; `/clear` forgets the conversation.

    Without a chat template the model just continues what both have written so far.
    """
    console = Console()
    template = engine.tokenizer is not None and bool(engine.tokenizer.chat_template)
    how = "" if template else " · no chat template: plain continuation"
    console.print(f"[dim]/exit or Ctrl-D leaves, /clear forgets, Ctrl-C stops an answer{how}[/dim]")
    encode(engine.tokenizer, "")  # refuse a store without a tokenizer before the first question
    session = engine.session()
    messages: list[dict[str, str]] = []
    while (said := _ask(console)) is not None:
        if said == "/clear":
            messages.clear()
            session.reset()
        elif said:
            _turn(engine, request, console, session, messages, said)


def _turn(
    engine: Engine,
    request: Request,
    console: Console,
    session: Session,
    messages: list[dict[str, str]],
    said: str,
) -> None:
    """One question and its answer; what goes wrong costs this turn, not the conversation."""
    messages.append({"role": "user", "content": said})
    try:
        ids = encode_chat(engine.tokenizer, messages)
        answer = answer_to(engine, ids, request, console, session)
    except TierrunError as error:
        messages.pop()
        log.error("%s (/clear forgets the conversation)", error)
        return
    messages.append({"role": "assistant", "content": answer.text})
    engine.save_usage()
    if len(session.tokens) == engine.context:
        log.warning("the context of %d tokens is full; /clear forgets it", engine.context)


def _ask(console: Console) -> str | None:
    with suppress(ImportError):
        import readline  # noqa: F401 (editing and history in input())
    try:
        said = console.input("[bold]> [/bold]")
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
    return None if said.strip() in ("/exit", "/quit") else said


def answer_to(
    engine: Engine, ids: list[int], request: Request, console: Console | None, session: Session
) -> Answer:
    """Generate after `ids`, print the text as it comes and the tiers' line after it."""
    answer = Answer(prompt_tokens=len(ids) - session.shared(ids))
    with _measured(engine, answer), _interruptible(engine), suppress(Interrupted):
        answer.interrupted = True
        for token in _generate(engine, ids, request, session):
            answer.tokens.append(token)
            if console is not None:
                write_raw(console, token.text or _shown_id(engine, token.id))
        answer.interrupted = False
    if console is not None:
        write_raw(console, "\n")
        console.print(f"[dim]{answer.line()}[/dim]", highlight=False, soft_wrap=True)
    log.debug("%s", answer.details())
    return answer


def _generate(
    engine: Engine, ids: list[int], request: Request, session: Session
) -> Iterator[TokenRecord]:
    return engine.generate(
        ids,
        _UNLIMITED if request.predict < 0 else request.predict,
        sampling=request.sampling,
        stop=request.stop,
        ignore_eos=request.ignore_eos,
        fixed=request.fixed,
        session=session,
    )


@contextmanager
def _measured(engine: Engine, answer: Answer) -> Iterator[None]:
    """Fill in what `answer` cost, however it ends."""
    started, before = time.perf_counter(), engine.stats()
    try:
        yield
    finally:
        after = engine.stats()
        answer.seconds = time.perf_counter() - started
        answer.counters = after.counters - before.counters
        answer.read_seconds = after.read_seconds - before.read_seconds


def _shown_id(engine: Engine, token: int) -> str:
    return "" if engine.tokenizer else f"{token} "


def write_raw(console: Console, text: str) -> None:
    """Text as it is: rich would expand tabs and wrap lines."""
    console.file.write(text)
    console.file.flush()


@contextmanager
def _interruptible(engine: Engine) -> Iterator[None]:
    """Ctrl-C ends the answer between two layers; a second one ends the program at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if engine.hook.interrupted:
            raise KeyboardInterrupt
        engine.hook.interrupted = True

    engine.hook.interrupted = False
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        engine.hook.interrupted = False
