"""The tests' own floor: without these, the others would check less than they seem to."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from spikegen.neurons import LIFSpec


def test_a_wrong_shape_is_refused() -> None:
    neuron = LIFSpec().build()
    assert neuron(torch.zeros(2, 3, 4)).shape == (2, 3, 4)
    with pytest.raises(TypeCheckError):
        neuron(torch.zeros(2))  # [T, B, *n] wants two dimensions at least
    with pytest.raises(TypeCheckError):
        neuron(torch.zeros(2, 3, 4, dtype=torch.int64))
    with pytest.raises(TypeCheckError):
        neuron.step(torch.zeros(2, 3), torch.zeros(2, 4))  # the membrane's shape is the current's


def test_a_warning_is_an_error() -> None:
    with pytest.raises(UserWarning, match="loud"):
        warnings.warn("loud", UserWarning, stacklevel=1)


def test_the_users_data_is_out_of_reach() -> None:
    assert Path.home() / ".cache" not in Path(os.environ["SPIKEGEN_DATA"]).parents


def test_real_data_can_be_read_and_written_beside(real_data: Path) -> None:
    file = real_data / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    assert file.read_bytes()[:2] == b"\x1f\x8b"  # gzip
    assert (real_data / "MNIST" / "raw").resolve() != file.resolve().parent


def test_threads_are_few() -> None:
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"]) <= 2
