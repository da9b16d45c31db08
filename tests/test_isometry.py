"""phi(J J^T) is that of the explicit Jacobian; the reference's blocks have the reference's; deep stacks are told of."""

import warnings

import pytest
import torch
from torch import nn

from spikegen.classifier import ClassifierConfig, SpikingClassifier
from spikegen.isometry import FACTOR, IsometryWarning, check, isometry, phi, under_statistics, warn_if_unstable
from spikegen.neurons import LIFSpec
from spikegen.residual import Block, ResidualSpec
from spikegen.stages import StageSpec, down_stage
from spikegen.threshold_norm import ThresholdNorm
from spikegen.vae import ModelConfig, SpikingVAE

NEURON = LIFSpec(beta=0.25, threshold=0.5, surrogate={"kind": "rectangle"})
CSA = {"kind": "csa", "reduction_c": 8, "kernel": 3}
STEM = {"kind": "stem", "channels": 4, "kernel": 3, "stride": 1}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def explicit(block, x):
    """tr(J J^T) / m of the whole Jacobian."""
    jacobian = torch.autograd.functional.jacobian(block, x)
    return (jacobian.square().sum() / block(x).numel()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (3, 4, 5)])
def test_a_linear_layer_with_rows_at_right_angles_needs_one_probe(dtype, shape):
    """||J^T v||^2 is then the same for every v of signs."""
    layer = nn.Linear(5, 4).to(dtype)
    rows = torch.linalg.qr(torch.randn(5, 4, dtype=dtype))[0].T * torch.rand(4, 1, dtype=dtype)
    layer.weight.data = rows
    x = torch.randn(shape, dtype=dtype)
    value, y = phi(layer, x, 1, generator())
    assert value == pytest.approx((rows.square().sum() / 4).item())
    torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Linear(8, 12)], ids=str)
def test_a_linear_layer(layer):
    value, _ = phi(layer, torch.randn(64, 8), 64, generator())
    assert value == pytest.approx((layer.weight.square().sum() / layer.out_features).item(), rel=0.05)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution(stride):
    layer = nn.Conv2d(3, 4, 3, stride, padding=1).double()
    x = torch.randn(4, 3, 6, 5).double()
    assert phi(layer, x, 200, generator())[0] == pytest.approx(explicit(layer, x), rel=0.05)


@pytest.mark.parametrize("reset", ["zero", "subtract"])
def test_a_stage_over_time_by_its_surrogate(reset):
    neuron = LIFSpec(beta=0.7, threshold=0.4, reset=reset)
    stage = down_stage(StageSpec(channels=4, stride=1), 2, neuron, "torch", None).double().eval()
    x = torch.randn(3, 1, 2, 4, 4).double()

    def steps(x):
        return stage(x)[0]

    rows = [torch.autograd.grad(y, x, retain_graph=True)[0] for x in [x.requires_grad_()] for y in steps(x).flatten()]
    expected = (torch.stack(rows).square().sum() / len(rows)).item()
    assert expected > 0.01
    assert phi(steps, x, 100, generator())[0] == pytest.approx(expected, rel=0.1)


def block_phi(variant, attention, last_norm=0.1, mean=0.0):
    spec = ResidualSpec(channels=32, stride=1, variant=variant, attention=attention)
    block = Block(spec, 32, 1, NEURON, "torch", spec.attention and spec.attention.build(1, 32))
    block.norm.scale = last_norm
    u = torch.randn(1, 16, 32, 8, 8) * 0.75 + mean
    block = under_statistics(block, u).eval()
    return phi(lambda u: block(u)[0], u, 8, generator())[0]


def test_the_references_blocks():
    """C = 32, 8x8, T = 1, norms at 0.5 and 0.1, the rectangle: MS 1.02, variant 1 1.00, variant 2 0.04 to 0.09."""
    assert block_phi(1, None) == pytest.approx(1.02, abs=0.01)
    assert block_phi(1, CSA) == pytest.approx(1.00, abs=0.005)
    assert block_phi(1, CSA | {"relu": True}) == pytest.approx(1.00, abs=0.005)
    assert 0.03 < block_phi(2, CSA) < 0.1
    assert block_phi(1, None, last_norm=1.0) == pytest.approx(3.4, abs=1)
    assert block_phi(1, CSA, last_norm=1.0) == pytest.approx(1.2, abs=0.15)


def test_the_statistics_are_the_batchs_and_the_network_is_left_alone():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), ThresholdNorm(3, 0.5)).double().eval()
    x = torch.randn(16, 2, 6, 6).double() + 1
    state, before = torch.get_rng_state(), net(x)
    copy = under_statistics(net, x)
    torch.testing.assert_close(copy.eval()(x), net.train()(x), rtol=1e-2, atol=1e-3)  # biased variance, unbiased
    net.load_state_dict(net.eval().state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(before, copy(x))
    currents = net[0](x)
    torch.testing.assert_close(copy[1].running_mean, currents.mean((0, 2, 3)))
    torch.testing.assert_close(copy[1].running_var, currents.var((0, 2, 3)))


def classifier(stages, **values):
    config = {"num_steps": 2, "stages": stages, "neuron": NEURON.model_dump(), "head": {"kind": "rate", "pool": True}}
    return SpikingClassifier(ClassifierConfig.model_validate(config | values), (1, 8, 8), ("a", "b"))


def residual(blocks, **values):
    return [STEM, {"kind": "residual", "channels": 4, "blocks": blocks, "stride": 1, **values}]


@pytest.mark.parametrize("encoding", ["direct", "rate", "latency"])
def test_every_block_by_name_and_fixed_by_the_seed(encoding):
    model = classifier([*residual(2), {"kind": "residual", "channels": 6, "blocks": 1}], encoding={"kind": encoding})
    x = torch.rand(3, 1, 8, 8) * 2 - 1
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = isometry(model, x, probes=2, seed=3)
    assert list(found) == ["encoder.1.blocks.0", "encoder.1.blocks.1", "encoder.2.blocks.0"]
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.manual_seed(1)
    assert isometry(model.eval(), x, probes=2, seed=3) == found
    assert isometry(model, x, probes=2, seed=4) != found


def test_a_block_is_seen_where_the_network_has_it():
    model = classifier(residual(3)).eval()
    x = torch.rand(3, 1, 8, 8) * 2 - 1
    seen = []
    stage = model.encoder[1]
    hook = stage.blocks[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(x)
    hook.remove()
    value, _ = phi(lambda u: stage.blocks[2](u)[0], seen[0], 20, generator())
    assert isometry(model, x, 20)["encoder.1.blocks.2"] == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize("latent", [{"kind": "bernoulli", "size": 4}, {"kind": "gaussian", "size": 4}], ids=str)
def test_an_autoencoders_two_halves(latent):
    stages = [{"channels": 4}, {"channels": 6, "attention": {"kind": "tcja"}}]
    config = {"num_steps": 3, "stages": stages, "latent": latent}
    model = SpikingVAE(ModelConfig.model_validate(config), (1, 8, 8), ("a", "b"))
    found = isometry(model, torch.randn(2, 1, 8, 8))
    assert list(found) == ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]
    assert all(v > 0 for v in found.values())


def test_what_is_warned_of():
    def blocks(*values, name="encoder"):
        return {f"{name}.{k}": v for k, v in enumerate(values)}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check({})
        check(blocks(*[1.02] * 51))  # what trains
        check(blocks(*[0.2] * 5))  # too few to matter
        check(blocks(*[0.1] * 3) | blocks(*[0.1] * 3, name="decoder"))
    with pytest.warns(IsometryWarning, match=r"from encoder\.50 back to encoder\.0 .* factor of 1e\+09"):
        check(blocks(*[1.5] * 51))
    with pytest.warns(IsometryWarning, match=r"from decoder\.7 back to decoder\.0 .* factor of 1e-08"):
        check(blocks(1.0) | blocks(*[0.1] * 8, name="decoder"))
    with pytest.warns(IsometryWarning, match=r"from encoder\.6 back to encoder\.2 .* factor of 1e-05"):
        check(blocks(1.1, 1.1, *[0.1] * 5, *[9.0] * 5))  # though the whole is 0.7
    with pytest.warns(IsometryWarning, match="factor of"):
        check(blocks(*[0.0] * 9))
    assert FACTOR == 100


def test_a_deep_stack_is_told_of_before_training():
    x = torch.rand(16, 1, 8, 8) * 2 - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_unstable(classifier(residual(8)), x)
        warn_if_unstable(classifier(residual(8), attention=CSA), x)
        warn_if_unstable(classifier(residual(3, variant=2), attention=CSA), x)
    unstable = classifier(residual(8, variant=2), attention=CSA, encoding={"kind": "rate"})
    before, state = {k: v.clone() for k, v in unstable.state_dict().items()}, torch.get_rng_state()
    with pytest.warns(IsometryWarning, match="will not train; use residual stages of variant 1, or fewer blocks"):
        warn_if_unstable(unstable, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in unstable.state_dict().items())


@pytest.mark.parametrize("conditional", [False, True])
def test_so_is_an_autoencoders(conditional):
    x = torch.rand(16, 1, 8, 8) * 2 - 1
    latent = {"kind": "spatial", "channels": 2}
    values = {"num_steps": 2, "neuron": NEURON, "latent": latent, "conditional": conditional}
    names = tuple("0123456789")
    deep = [STEM, {"kind": "residual", "channels": 4, "blocks": 8, "stride": 1, "variant": 2}]
    unstable = SpikingVAE(ModelConfig.model_validate(values | {"stages": deep, "attention": CSA}), (1, 8, 8), names)
    with pytest.warns(IsometryWarning, match=r"back to encoder\."):
        warn_if_unstable(unstable, x)
    plain = [{"channels": 4, "stride": 1}] * 6
    weak = SpikingVAE(ModelConfig.model_validate(values | {"stages": plain}), (1, 8, 8), names)
    for stage in weak.decoder:
        torch.nn.init.constant_(stage.norm.weight, 1e-3)
    with pytest.warns(IsometryWarning, match=r"back to decoder\."):
        warn_if_unstable(weak, x)
