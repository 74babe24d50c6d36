"""Which tokens begin a text and end an answer, as llama.cpp tells them."""

from typing import Any

_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")

_END_TEXTS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]",
        "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
        "<｜end▁of▁sentence｜>", "[e~[", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
    )
)  # fmt: skip
"""Tokens that end an answer under whatever id: few files name all of theirs."""


def end_tokens(metadata: dict[str, Any]) -> dict[str, Any]:
    """BOS, padding and all end tokens, as generation_config.json has them."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    ends = {_id(metadata, name, len(tokens)) for name in _END_KEYS}
    ends |= {number for number, token in enumerate(tokens) if token in _END_TEXTS}
    texts = {number: tokens[number] for number in ends if number is not None}
    found = sorted(number for number, text in texts.items() if not _continues(text, texts))
    named = {
        "bos_token_id": _id(metadata, "bos", len(tokens)),
        "eos_token_id": found if len(found) > 1 else next(iter(found), None),
        "pad_token_id": _id(metadata, "padding", len(tokens)),
    }
    return {name: value for name, value in named.items() if value is not None}


def _continues(text: str, ends: dict[int, str]) -> bool:
    """Whether a token that ends other models' answers does not end this one's."""
    others = set(ends.values())
    if text == "<|end|>":  # of a message, after which gpt-oss and solar-open go on
        return others >= {"<|return|>", "<|call|>"} or (
            "<|flush|>" in others and not others.isdisjoint({"<|call|>", "<|calls|>"})
        )
    return text == "</s>" and "<|tool_response>" in others  # HTML, to gemma4


def _id(metadata: dict[str, Any], name: str, count: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return value if type(value) is int and 0 <= value < count else None
