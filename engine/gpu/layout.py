"""What kernels must know of one experts layer: where its matrices lie in a record, and its gate."""

from dataclasses import dataclass

from torch import nn

from tierrun.engine.codecs.codec import find_codec
from tierrun.engine.codecs.dense import DTYPES
from tierrun.engine.gpu.activations import recognise
from tierrun.engine.gpu.weights import geometry_of
from tierrun.engine.kernels.matmul import Operand
from tierrun.engine.kernels.matvec import Bias, Gate
from tierrun.io.errors import ModelError
from tierrun.io.store import Matrix, RecordClass

NO_GATE = Gate("none")


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """One expert's MLP.

    `first` is gate_up (or up alone), or gate and up apart where their codecs differ. `gate` is what
    the first product's kernel applies; with the kind `none` the module applies its own activation
    between two launches.
    """

    first: tuple[Operand, ...]
    down: Operand
    gate: Gate


def expert_layout(module: nn.Module, record: RecordClass) -> ExpertLayout:
    """The layout of `module`'s experts in records of class `record`.

    Raises:
        ModelError: gate and up apart with a bias that belongs to both.
    """
    matrices = {matrix.name: matrix for matrix in record.matrices}
    names = [n for n in ("gate_up_proj", "gate_proj", "up_proj") if n in matrices]
    if len(names) == 2 and "gate_up_proj_bias" in matrices:
        raise ModelError(
            "experts with biases whose gate and up are in different codecs do not run on a GPU; "
            "use --device cpu, or convert with --requant"
        )
    gate = None
    if names == ["gate_up_proj"]:
        gate = recognise(module, matrices["down_proj"].shape[1])
    return ExpertLayout(
        first=tuple(_operand(name, matrices) for name in names),
        down=_operand("down_proj", matrices),
        gate=gate or NO_GATE,
    )


def _operand(name: str, matrices: dict[str, Matrix]) -> Operand:
    matrix = matrices[name]
    kind = DTYPES[matrix.codec] if matrix.codec in DTYPES else find_codec(matrix.codec)
    bias = matrices.get(f"{name}_bias")
    return Operand(
        matrix=geometry_of(kind, matrix.shape),
        offset=matrix.extent.offset,
        bias=None if bias is None else Bias(bias.extent.offset, DTYPES[bias.codec]),
    )
