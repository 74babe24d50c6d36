"""A store read with plain safetensors and put together again as the model's state dict."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from tierrun.engine.architecture import experts_modules
from tierrun.io.store import ExpertKey, Store, record_name

_CODECS = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def read_tensors(store: Store) -> dict[str, torch.Tensor]:
    """Every tensor of every shard, by other people's code."""
    tensors = {}
    for path in store.shard_paths:
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def state_dict(store: Store, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The store's weights under the names and in the orientation of `model`."""
    tensors = read_tensors(store)
    manifest = store.manifest
    state = {resident.name: tensors[resident.name] for resident in manifest.residents}
    modules = experts_modules(model)
    for number, layer in enumerate(manifest.layers):
        transposed = bool(modules[layer.path].is_transposed)
        for matrix in manifest.class_of(number).matrices:
            rows = []
            for expert in range(len(layer.records)):
                record = tensors[record_name(ExpertKey(number, expert))]
                data = record[matrix.extent.offset : matrix.extent.end]
                value = data.view(_CODECS[matrix.codec]).view(matrix.shape)
                rows.append(value.T if transposed and value.ndim == 2 else value)
            state[f"{layer.path}.{matrix.name}"] = torch.stack(rows)
    return state


def assert_same_weights(store: Store, model: PreTrainedModel, *, same_dtypes: bool = True) -> None:
    """The store holds exactly the weights of `model`, bit for bit.

    Without `same_dtypes`, in the model's dtypes (it may keep some weights in fp32 of which a bf16
    checkpoint has no more than 16 bits).
    """
    ours, theirs = state_dict(store, model), model.state_dict()
    assert ours.keys() <= theirs.keys()
    assert theirs.keys() - ours.keys() <= set(model.all_tied_weights_keys)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype or not same_dtypes, name
        assert _bits(tensor.to(theirs[name].dtype)) == _bits(theirs[name]), name


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def contents(*directories: Path) -> dict[str, bytes]:
    """Every file of a store by its name, whichever directory holds it."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for directory in directories
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
