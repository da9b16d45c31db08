"""The recorded gates are those that the spikes, the currents and the membranes were multiplied with."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spikegen.attention import TCJA
from spikegen.gates import record_gates
from spikegen.multi_attention import MultiAttention
from spikegen.prior import MaskedSpec
from spikegen.training import build_model
from spikegen.vae import SpikingVAE
from tests.tiny import tiny_config

DIGITS = tuple("0123456789")


def build(attention: dict[str, Any], steps: int = 3, prior: dict[str, Any] | None = None) -> SpikingVAE:
    torch.manual_seed(0)
    latent = {"kind": "spatial", "channels": 2}
    config = tiny_config(model__attention=attention, model__latent=latent, model__num_steps=steps)
    model = build_model(config, DIGITS)
    if prior is not None:
        model.add_prior(MaskedSpec.model_validate({"channels": 8, "blocks": 2, "heads": 2, "components": 2} | prior))
    return model.eval()


def images(count: int) -> Tensor:
    return torch.rand(count, 1, 8, 8) * 2 - 1


def watch(model: SpikingVAE, name: str) -> list[tuple[Tensor, Tensor]]:
    """What the block of this stage multiplies, [t, B, C, H, W] before and after, filled by a later call."""
    seen: list[tuple[Tensor, Tensor]] = []
    block = model.get_submodule(f"{name}.attention")
    if isinstance(block, MultiAttention) and block.in_scan:
        gate = block.gate_step

        def gated(u: Tensor) -> Tensor:
            seen.append((u.unsqueeze(0), gate(u).unsqueeze(0)))
            return seen[-1][1][0]

        block.gate_step = gated  # type: ignore[method-assign]
    else:

        def attended(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            current, norm, offset = inputs if isinstance(block, MultiAttention) else (inputs[0], None, None)
            seen.append((current if norm is None else norm.running(offset).apply(current), output))

        block.register_forward_hook(attended)
    return seen


def found(model: SpikingVAE, x: Tensor, block: str) -> dict[str, Tensor]:
    label = torch.arange(len(x)) % 10
    return {gate.kind: gate.map for gate in record_gates(model, x, label) if gate.block == block}


@pytest.mark.parametrize("stage", ["encoder.0", "encoder.1", "decoder.0"])
@pytest.mark.parametrize(
    ("attention", "kinds"),
    [
        ({"kind": "tcja", "kernel_t": 2, "kernel_c": 2}, ["joint"]),
        ({"kind": "ta", "reduction_t": 1}, ["time"]),
        ({"kind": "tca", "reduction_t": 1, "reduction_c": 1}, ["time", "channels"]),
        ({"kind": "tca", "authors": True}, ["time", "channels"]),
        ({"kind": "ca", "reduction_c": 1}, ["channels"]),
        ({"kind": "ca", "reduction_c": 1, "placement": "membrane"}, ["channels"]),
    ],
    ids=str,
)
def test_what_is_recorded_is_what_the_block_multiplied_with(stage: str, attention: dict[str, Any], kinds: list[str]):
    model, x = build(attention), images(1)
    seen = watch(model, stage)
    maps = found(model, x, stage)
    assert list(maps) == kinds
    before, after = (torch.cat(parts)[:, 0] for parts in zip(*seen, strict=True))
    gate = torch.ones(before.shape[1], 3)
    for part in maps.values():
        gate = gate * part
    expected = before * gate.T[:, :, None, None]
    torch.testing.assert_close(after, expected.relu() if attention.get("authors") else expected)
    assert all(part.min() > 0 and part.max() < 1 for part in maps.values())


@pytest.mark.parametrize("placement", ["post", "membrane"])
def test_a_space_gate_is_the_mean_over_the_steps(placement: str):
    model, x = build({"kind": "sa", "kernel": 3, "placement": placement}), images(1)
    seen = watch(model, "decoder.1")
    maps = found(model, x, "decoder.1")
    before, after = (torch.cat(parts)[:, 0] for parts in zip(*seen, strict=True))
    assert before.shape == (3, 4, 8, 8)
    ratio = after.double().sum(1) / before.double().sum(1)  # a place's gate is the same for all channels
    torch.testing.assert_close(maps["space"].double(), ratio.mean(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention", [{"kind": "tcja"}, {"kind": "tcsa"}, {"kind": "csa", "placement": "membrane"}])
def test_a_map_is_the_mean_of_its_images(attention: dict[str, Any]):
    model, x = build(attention), images(3)
    every = [found(model, x[k : k + 1], "encoder.0") for k in range(3)]
    for kind, part in found(model, x, "encoder.0").items():
        torch.testing.assert_close(part, torch.stack([one[kind] for one in every]).mean(0))


@pytest.mark.parametrize("inner", [{"kind": "tcja"}, {"kind": "tcsa"}])
def test_the_priors_blocks_are_recorded_over_its_own_steps(inner: dict[str, Any]):
    model, x = build({"kind": "tcja"}, 3, {"num_steps": 2, "attention": inner}), images(4)
    state = torch.get_rng_state()
    gates, again = (record_gates(model, x, torch.arange(4)) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    shapes = {(gate.block, gate.kind): tuple(gate.map.shape) for gate in gates}
    for block in ("prior.blocks.0.stage", "prior.blocks.1.stage"):
        if inner["kind"] == "tcja":
            assert shapes[block, "joint"] == (8, 2)
        else:
            assert [shapes[block, kind] for kind in ("time", "channels", "space")] == [(1, 2), (8, 2), (2, 2)]
    assert shapes["encoder.1", "joint"] == (8, 3)
    assert all(torch.equal(one.map, other.map) for one, other in zip(gates, again, strict=True))


def test_no_block_is_left_out_and_no_hook_is_left_behind():
    model = build({"kind": "tcja"}, prior={})
    blocks = [m for m in model.modules() if isinstance(m, TCJA)]
    assert len(record_gates(model, images(2), torch.arange(2))) == len(blocks) == 6
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if isinstance(m, nn.Module))


def test_a_model_without_attention_has_no_gates():
    config = tiny_config(model__attention=None, model__conditional=False)
    assert record_gates(build_model(config, DIGITS).eval(), images(2)) == []
