"""Files of weights that others made: read without unpickling, and known by one hash in any format."""

import hashlib
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor

from spikegen.spec import UserError
from spikegen.storage import user_mistakes

_RIGHT = "give a .safetensors file, or a .pth file that holds a state dict and nothing else"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors file, or in a .pth file that holds nothing else: nothing is unpickled.

    UserError when the file is absent, broken or holds anything but named tensors.
    """
    with user_mistakes("read", path), open(path, "rb"):
        pass
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes of a broken or foreign file lead to
        detail = "" if isinstance(error, UnpicklingError) else f" ({one_line(error)[:100]})"
        raise UserError(f"{path}: not a file of weights{detail}; {_RIGHT}") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: holds other things than named tensors; {_RIGHT}")
    return dict(state)


def weights_hash(state: dict[str, Tensor]) -> str:
    """SHA-256 of every tensor's name, type, shape and bytes: one network has one hash in any file format."""
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(f"{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def one_line(error: Exception) -> str:
    """An error's text on one line, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
