"""Makes the demo model's corpus and tokenizer from one CPython source tree.

    tar xf Python-3.13.5.tar.xz          # from python.org, or `apt-get source python3.13`
    python -m tierrun.tools.demo.corpus Python-3.13.5 .corpus

The folder made holds the tokenizer, LICENSE-PSF.txt and tokens.npz: for each of the three
domains (library code, test code, documentation prose) one stream of tokens to train on and one
held out, every document closed by the end-of-text token. Documents are held out whole.
"""

import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tierrun.tools.demo.rst import plain_text

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
MAX_POSITIONS = 2048
HELD_OUT_ONE_IN = 40
LARGEST_FILE_BYTES = 160_000
DATA_TABLES = re.compile(r"Lib/(encodings|pydoc_data|html/entities|stringprep|lib2to3|test/.*data)")
LINE_END_OR_INDENT = r"\n|(?<=\n)[ \t]+"
NEWS_HEADING = re.compile(r"^(?=What's New in Python )", re.MULTILINE)


class Document(NamedTuple):
    domain: str
    name: str
    text: str

    @property
    def split(self) -> str:
        is_held_out = zlib.crc32(self.name.encode()) % HELD_OUT_ONE_IN == 0
        return "held" if is_held_out else "train"


def code_documents(source: Path) -> Iterator[Document]:
    """Every Python file of the tree that is neither a table of data nor very large."""
    for path in sorted(source.rglob("*.py")):
        name = path.relative_to(source).as_posix()
        text = _read(path)
        if text and not DATA_TABLES.match(name):
            is_test = "/test" in name or "_test" in name
            yield Document("tests" if is_test else "code", name, text)


def prose_documents(source: Path) -> Iterator[Document]:
    """The documentation page by page, and the change notes release by release."""
    for path in sorted((source / "Doc").rglob("*.rst")):
        name = path.relative_to(source).as_posix()
        yield Document("prose", name, plain_text(path.read_text("utf-8")))
    for name in ("Misc/NEWS", "Misc/HISTORY"):
        releases = NEWS_HEADING.split((source / name).read_text("utf-8"))
        for text in releases[1:]:
            yield Document("prose", f"{name}/{text.partition(chr(10))[0]}", plain_text(text))


def _read(path: Path) -> str | None:
    if path.stat().st_size > LARGEST_FILE_BYTES:
        return None
    try:
        return path.read_text("utf-8").strip() + "\n"
    except UnicodeDecodeError:  # the tests of source encodings
        return None


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every byte is in the vocabulary, so that no text is unknown.

    Line ends and indentation are tokens of their own, so that a prompt may end with them.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LINE_END_OR_INDENT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in documents if document.domain != "tests")
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def tokenize(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document]
) -> dict[str, NDArray[np.uint16]]:
    """The streams of tokens, by domain and split: prose_train, prose_held, and so on."""
    streams: dict[str, list[int]] = {}
    for document in documents:
        stream = streams.setdefault(f"{document.domain}_{document.split}", [])
        stream += tokenizer.backend_tokenizer.encode(document.text).ids
        stream.append(tokenizer.eos_token_id)
    return {name: np.array(ids, dtype=np.uint16) for name, ids in streams.items()}


def main(source: Path, corpus: Path) -> None:
    """Make the folder CORPUS from the CPython source tree SOURCE."""
    corpus.mkdir(parents=True, exist_ok=True)
    documents = [*code_documents(source), *prose_documents(source)]
    tokenizer = train_tokenizer(documents)
    tokenizer.save_pretrained(corpus)
    shutil.copyfile(source / "LICENSE", corpus / "LICENSE-PSF.txt")
    streams = tokenize(tokenizer, documents)
    save_arrays: Callable[..., None] = np.savez_compressed
    save_arrays(corpus / "tokens.npz", **streams)
    for name, stream in streams.items():
        print(f"{name}: {len(stream):,} tokens")
    print(f"{len(documents):,} documents, {sum(len(d.text) for d in documents):,} characters")


if __name__ == "__main__":
    typer.run(main)
