"""A network's weights have one hash, whatever file they come from."""

import torch
from safetensors.torch import save_file

from spikegen.weights import read_weights, weights_hash


def test_read_weights_and_hash_do_not_depend_on_the_format(tmp_path):
    state = {"a": torch.randn(3), "b": torch.tensor(2)}
    torch.save(state, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    one, other = read_weights(tmp_path / "w.pth"), read_weights(tmp_path / "w.safetensors")
    assert weights_hash(one) == weights_hash(other) == weights_hash(state)
    assert weights_hash(state | {"b": torch.tensor(3)}) != weights_hash(state)
