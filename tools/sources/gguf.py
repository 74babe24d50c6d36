"""A checkpoint in GGUF files: its tensors as they lie there, everything else from the metadata."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.expand import dequantise, first_bad_row
from tierrun.engine.codecs.planes import Fields, levels
from tierrun.io.errors import CheckpointError
from tierrun.tools.mapping import Mapping
from tierrun.tools.sources.ggml_blocks import CODECS, fields
from tierrun.tools.sources.gguf_files import check_pieces, model_stem
from tierrun.tools.sources.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from tierrun.tools.sources.gguf_model import write_model_files
from tierrun.tools.sources.gguf_names import map_gguf
from tierrun.tools.sources.packing import Packing
from tierrun.tools.sources.reading import Files, fingerprint, read_elements

_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip

_ROPE_FREQS = "rope_freqs.weight"
_MOST_FREQS = 1 << 16
"""Half of the widest head that a configuration may have."""

_PIECE = 1 << 20
"""Elements that are expanded at once, in rows: their temporaries are several times larger."""


@dataclass(slots=True)
class GgufCheckpoint:
    """An opened model: `tensors` by GGUF's names, with their file; shapes as torch says them.

    A quantised tensor is fp32 to whoever reads it. `lossy` are those whose type has no codec: they
    have no packing and must be quantised anew. `close` (or `with`) closes the files.
    """

    directory: Path
    model_id: str
    metadata: dict[str, Any]
    tensors: dict[str, tuple[Path, GgufTensor]]
    lossy: frozenset[str]
    _scratch: TemporaryDirectory[str]
    _files: Files = field(default_factory=Files)

    @classmethod
    def open(
        cls,
        paths: Sequence[Path],
        *,
        config: Path | None = None,
        tokenizer: Path | None = None,
        requant: bool = False,
    ) -> Self:
        """Read the headers of the files `paths`, all of one model.

        `config` and `tokenizer` are directories whose files stand in for what the metadata says.

        Raises:
            CheckpointError: a header that contradicts its file, a type without a codec (unless
                `requant`), an architecture or a tokenizer that cannot be rebuilt.
        """
        headers = [_header(path) for path in paths]
        check_pieces(paths, headers)
        _check_model(paths[0], headers[0].metadata)
        tensors = {
            name: (path, tensor)
            for path, header in zip(paths, headers, strict=True)
            for name, tensor in header.tensors.items()
        }
        lossy = frozenset(name for name, (_, tensor) in tensors.items() if _is_lossy(tensor))
        for name in sorted(lossy):
            _check_readable(*tensors[name], name, requant)
        scratch = TemporaryDirectory(prefix="tierrun-")
        directory = Path(scratch.name) / model_stem(paths[0])
        metadata = headers[0].metadata
        name = _model_id(paths[0], metadata)
        checkpoint = cls(directory, name, metadata, tensors, lossy, scratch)
        try:
            directory.mkdir()
            checkpoint._write_model_files(paths[0], config, tokenizer)
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def _write_model_files(self, path: Path, config: Path | None, tokenizer: Path | None) -> None:
        shapes = {name: tensor.shape for name, (_, tensor) in self.tensors.items()}
        rope_freqs, shape = None, shapes.get(_ROPE_FREQS, ())
        if len(shape) == 1 and shape[0] <= _MOST_FREQS:
            rope_freqs = self.read(_ROPE_FREQS).tolist()
        write_model_files(
            path, self.metadata, shapes, rope_freqs, self.directory, config, tokenizer
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()
        self._scratch.cleanup()

    def mapping(self, model: PreTrainedModel) -> Mapping:
        return map_gguf(model, self.tensors, str(self.metadata.get("general.architecture")))

    def fingerprint(self) -> str:
        config = (self.directory / "config.json").read_bytes()
        return fingerprint(config, self.tensors, self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][1].shape

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES.get(self.tensors[name][1].type.name, torch.float32)

    def packing(self, name: str) -> Packing | None:
        tensor = self.tensors[name][1]
        if tensor.type.number not in CODECS:
            return None
        return Packing(find_codec(CODECS[tensor.type.number]), len(tensor.shape) - 1)

    def fields(self, name: str, start: int, stop: int) -> Fields:
        """Rows `start` to `stop` of the quantised tensor `name`; see `PackedSource`."""
        path, tensor = self.tensors[name]
        found = fields(tensor.type.number, self._rows(name, start, stop))
        codec = find_codec(CODECS[tensor.type.number])
        for level, values in zip(levels(codec), found.levels, strict=True):
            bad = first_bad_row(level, values)
            if bad is not None:
                raise _bad_scale(path, name, start + bad)
        return found

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The bytes of some rows, uint8 [rows, row bytes]."""
        path, tensor = self.tensors[name]
        offset = tensor.extent.offset + start * tensor.row_bytes
        nbytes = (stop - start) * tensor.row_bytes
        return self._files.read(path, name, offset, nbytes).view(-1, tensor.row_bytes)

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """Tensor `name` in fresh memory, or of its first dimension only `row` ([1, …])."""
        return read_elements(self.shape(name), row, partial(self.elements, name))

    def elements(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of tensor `name`, counted in memory order ([stop - start])."""
        path, tensor = self.tensors[name]
        if tensor.type.name in _DTYPES:
            dtype = self.dtype(name)
            offset = tensor.extent.offset + start * dtype.itemsize
            data = self._files.read(path, name, offset, (stop - start) * dtype.itemsize)
            return data.view(dtype)
        columns = tensor.shape[-1]
        out, step = torch.empty(stop - start), max(1, _PIECE // columns)
        for row in range(start // columns, -(-stop // columns), step):
            last = min(row + step, -(-stop // columns))
            values = self._expanded(name, row, last).flatten()
            first, end = max(start, row * columns), min(stop, last * columns)
            out[first - start : end - start] = values[first - row * columns : end - row * columns]
        return out

    def _expanded(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of the quantised tensor `name`, fp32 [rows, columns]."""
        path, tensor = self.tensors[name]
        if tensor.type.number in CODECS:
            codec = find_codec(CODECS[tensor.type.number])
            return dequantise(codec, self.fields(name, start, stop))
        values = _expand(self._rows(name, start, stop), tensor)
        bad = ~values.isfinite().all(dim=1)
        if bad.any():
            raise _bad_scale(path, name, start + int(bad.int().argmax()))
        return values


def _header(path: Path) -> GgufHeader:
    try:
        return read_gguf_header(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _check_model(path: Path, metadata: dict[str, Any]) -> None:
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{path} is no model, it says, but {kind!r}; name the model's file")


def _is_lossy(tensor: GgufTensor) -> bool:
    return tensor.type.name not in _DTYPES and tensor.type.number not in CODECS


def _check_readable(path: Path, tensor: GgufTensor, name: str, requant: bool) -> None:
    """Raises unless the tensor, of a type without a codec, can and may be expanded by gguf."""
    what = f"{path}: tensor {name} is {tensor.type.name}, which"
    try:
        _expand(torch.zeros(1, tensor.type.nbytes, dtype=torch.uint8), tensor)
    except NotImplementedError:
        raise CheckpointError(f"{what} gguf cannot expand; use another quantisation") from None
    if not requant:
        raise CheckpointError(
            f"{what} tierrun cannot keep; --requant q4_0 quantises such tensors anew (lossy)"
        )


def _expand(rows: torch.Tensor, tensor: GgufTensor) -> torch.Tensor:
    """The numbers in some rows of a tensor whose type has no codec, fp32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(rows.numpy(), GGMLQuantizationType(tensor.type.number)))


def _bad_scale(path: Path, name: str, row: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: tensor {name} has a scale in row {row} that is NaN or infinite; download it again"
    )


def _model_id(path: Path, metadata: dict[str, Any]) -> str:
    name = metadata.get("general.name")
    is_name = isinstance(name, str) and name.isprintable() and 0 < len(name) <= 200
    return str(name) if is_name else model_stem(path)
