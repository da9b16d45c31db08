"""Weights of any module come back from its folder; what is no model is named."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from spikegen.latents import SpatialSpec
from spikegen.saving import CONFIG, WEIGHTS, find_model, load_weights, save_model
from spikegen.spec import UserError


def test_a_modules_weights_come_back(tmp_path: Path) -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    save_model(tmp_path, first.state_dict(), SpatialSpec())
    folder = find_model(tmp_path)
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    assert (
        len({(folder / name).stat().st_mode for name in (CONFIG, WEIGHTS)}) == 1
    )  # whoever may read one may the other
    load_weights(second, folder / WEIGHTS, folder / CONFIG)
    assert all(torch.equal(second.state_dict()[k], v) for k, v in first.state_dict().items())
    with pytest.raises(UserError, match=rf"{WEIGHTS} does not fit .*{CONFIG}: size mismatch"):
        load_weights(nn.Linear(3, 4), folder / WEIGHTS, folder / CONFIG)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_named(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    layer = nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        layer.bias[1] = value
    save_model(tmp_path, layer.state_dict(), SpatialSpec())
    with pytest.raises(UserError, match=rf"{WEIGHTS}: bias has numbers that are not finite; .* train anew"):
        load_weights(layer, tmp_path / WEIGHTS, tmp_path / CONFIG)


@pytest.mark.parametrize("name", ["nowhere", "/no/where", "a/b/c"])
def test_a_name_that_is_no_hub_id_is_refused_without_asking(name: str) -> None:
    with pytest.raises(UserError, match="a hub id is OWNER/NAME"):
        find_model(name)
