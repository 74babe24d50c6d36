"""How byte-level vocabularies split text into words, under llama.cpp's names for the ways.

From llama.cpp's src/llama-vocab.cpp, in the spelling of the original tokenizers where it quotes
that. transformers knows fewer and takes GPT-2's for any other, silently: wrong ids.
"""

from typing import NamedTuple


class Split(NamedTuple):
    """Patterns, applied one after the other to what the one before has left whole.

    `whole_words` says that a word in the vocabulary is its token, whatever the merges say. `bos`
    says that texts begin with BOS where the file does not.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False


_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MARKS = r" ?[^\s\p{L}\p{N}]+"
_CJK = "[一-龥ࠀ-一가-퟿]+"
_LETTERS = (  # that have cases, as DeepSeek LLM's tokenizer lists them: of an older Unicode
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10C7}-\x{10FF}\x{1C80}-\x{1C8A}\x{2D00}-\x{2D2D}"
    r"\x{A790}-\x{A7FA}\x{AB30}-\x{AB68}\x{10570}-\x{105BC}\x{10D50}-\x{10D85}\x{16E40}-\x{16E7F}"
    r"\x{1D400}-\x{1D7CB}\x{1DF00}-\x{1DF2A}]]"
)


def _words(digits: str) -> str:
    return rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_MARKS}[\r\n]*|{_SPACE}"


def _cased(suffix: str, digits: str) -> str:
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{lead}{_UPPER}*{_LOWER}+{suffix}|{lead}{_UPPER}+{_LOWER}*{suffix}|{digits}|"
        rf"{_MARKS}[\r\n/]*|{_SPACE}"
    )


_LLAMA3 = (_words(r"\p{N}{1,3}"),)
_QWEN2 = (_words(r"\p{N}"),)
_QWEN35 = (
    rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACE}",
)
_GPT4O = (_cased(f"{_SUFFIX}?", r"\p{N}{1,3}"),)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACE}",
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?{_LETTERS}+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    _CJK,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|"
    r"\s*[\r\n]|\s+(?!\S)|\s+",
)
_SEED_CODER = (
    rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACE}",
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

_GROUPS = (
    (Split(_LLAMA3, whole_words=True, bos=True), "llama3 llama-v3 llama-bpe falcon3 falcon-h1 "
     "pixtral midm-2.0 lfm2"),
    (Split(_LLAMA3), "dbrx smaug-bpe chatglm-bpe"),
    (Split(_LLAMA3, whole_words=True), "glm4 glm5"),
    (Split(_QWEN2), "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open grok-2"),
    (Split(_QWEN35), "qwen35"),
    (Split(_GPT4O), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (Split((_cased("", r"\p{N}"),), whole_words=True, bos=True), "tekken"),
    (Split((r"\d{1,3}(?=(?:\d{3})*\b)", *_GPT4O)), "tiny_aya cohere2moe"),
    (Split(_DEEPSEEK3), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (Split(_DEEPSEEK_LLM), "deepseek-llm"),
    (Split(_DEEPSEEK_CODER), "deepseek-coder"),
    (Split(_BAILING), "bailingmoe bailingmoe2 llada-moe"),
    (Split(_SEED_CODER), "seed-coder"),
    (Split((_GPT2,)), "gpt-2 phi-2 olmo mpt jais trillion exaone4 a.x-4.0 mellum gigachat "
     "granite-docling"),
    (Split((r"\p{N}", _GPT2)), "starcoder refact command-r smollm codeshell exaone minerva-7b "
     "mellum2"),
    (Split(_FALCON), "falcon"),
    (Split(_DEFAULT), "default"),
)  # fmt: skip

SPLITS: dict[str, Split] = {name: split for split, names in _GROUPS for name in names.split()}
"""`tokenizer.ggml.pre` → how text is split."""
