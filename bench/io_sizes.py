"""Record sizes of real models: what one expert takes on disk.

The dimensions are those of the published configurations; a record is gate, up and down, three
matrices of hidden × intermediate, in the bits per weight of a codec (docs/design.md), in whole
pages. Bias vectors, where there are any, are far below a per cent.
"""

from typing import NamedTuple

from tierrun.io.extent import align_up


class ModelRecord(NamedTuple):
    """One expert of a model: its dimensions, its codec, and how many of its matrices."""

    model: str
    hidden: int
    intermediate: int
    codec: str
    bits: float
    matrices: int = 3

    @property
    def nbytes(self) -> int:
        weights = self.matrices * self.hidden * self.intermediate
        return align_up(round(weights * self.bits / 8))


RECORDS = (
    # The smallest read there is: one matrix of a small expert, as GGUF files keep them apart.
    ModelRecord("granite-3.1-1b-a400m, one matrix", 1024, 512, "q4_k", 4.625, matrices=1),
    ModelRecord("granite-3.1-1b-a400m", 1024, 512, "q4_k", 4.625),
    ModelRecord("qwen3.6-35b-a3b", 2048, 512, "q4_k", 4.625),
    ModelRecord("qwen3-30b-a3b", 2048, 768, "q4_k", 4.625),
    ModelRecord("minimax-m2", 3072, 1536, "q4_k", 4.625),
    ModelRecord("gpt-oss-120b", 2880, 2880, "mxfp4", 4.25),
    ModelRecord("glm-5", 6144, 2048, "q4_k", 4.625),
    ModelRecord("glm-5", 6144, 2048, "fp8", 8.25),
)
"""0.3 to 39 MB, ascending, each about twice the one before."""

USUAL = tuple(RECORDS[index].nbytes for index in (0, 2, 4, 7))
"""What is measured where nothing else is asked."""

ALL = tuple(record.nbytes for record in RECORDS)
