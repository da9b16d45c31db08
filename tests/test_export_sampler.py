"""Exported samplers: the model's own images, at any batch size, of operators that are not ours."""

import io
import re
import subprocess
import sys

import onnxruntime
import pytest
import torch

from spikegen.export_sampler import to_program, write_sampler
from spikegen.prior import MaskedSpec
from spikegen.spec import UserError
from spikegen.threshold_norm import ThresholdNorm
from spikegen.vae import ModelConfig, SpikingVAE
from tests.inputs import fill

LATENTS = {
    "bernoulli": {"kind": "bernoulli", "size": 4, "candidates": 3},
    "poisson": {"kind": "poisson", "size": 6},
    "gaussian": {"kind": "gaussian", "size": 6},
    "spatial": {"kind": "spatial", "channels": 3},
}
TCJA = {"kind": "tcja", "kernel_t": 2, "kernel_c": 2}


@torch.no_grad()
def vae(latent="spatial", prior=None, **values):
    """Small, with statistics under which neurons fire."""
    torch.manual_seed(0)
    conditional = latent in ("bernoulli", "spatial")
    defaults = {"num_steps": 2, "stages": [{"channels": 4}], "attention": TCJA}
    config = defaults | {"latent": LATENTS[latent], "conditional": conditional} | values
    model = SpikingVAE(ModelConfig.model_validate(config), (1, 8, 8), ("cat", "dog", "bird"))
    if prior:
        fill(model.add_prior(prior).mixture)
    for norm in (m for m in model.modules() if isinstance(m, ThresholdNorm)):
        norm.running_var.uniform_(0.005, 0.05)
        norm.bias.uniform_(-0.2, 0.4)
    model.readout.conv.weight.mul_(5)
    return model.eval()


MASKED = MaskedSpec(channels=8, blocks=1, attend_every=1, heads=2, components=3, passes=5, guidance=0.5)


def draws(model, count):
    rows, numbers = model.noise_shape()
    noise = torch.rand(rows, count, numbers)
    return (noise, torch.randint(3, (count,))) if model.config.conditional else (noise,)


def images(model, noise, label=None):
    return model.decode((model.prior or model.latent).sample(noise, label)).detach()


MODELS = {
    **{latent: {"latent": latent} for latent in LATENTS},
    "subtract": {"neuron": {"reset": "subtract", "beta": 0.7}, "attention": {"kind": "csa", "placement": "membrane"}},
    "ta": {"attention": {"kind": "ta"}, "readout": {"kind": "tcja"}},
    "relu": {"neuron": {"kind": "relu"}, "attention": None, "conditional": False},
    "one_channel": {"stages": [{"channels": 1}]},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_program_draws_the_models_images(tmp_path, name):
    model = vae(**MODELS[name])
    says = write_sampler(model, tmp_path / "a.pt2", "torch")
    assert re.fullmatch(r"noise \[\d, B, \d+\] in \[0, 1\).* -> images \[B, 1, \d, \d\] in \[-1, 1\]", says)
    assert ("label [B] in 0..2" in says) == model.config.conditional
    program = torch.export.load(tmp_path / "a.pt2")
    used = {str(n.target) for m in program.graph_module.modules() if hasattr(m, "graph") for n in m.graph.nodes}
    assert not [target for target in used if "spikegen" in target]
    for count in (1, 2, 9):
        given = draws(model, count)
        expected = images(model, *given)
        torch.testing.assert_close(program.module()(*given), expected, rtol=0, atol=1e-5)
    assert expected.std(0).mean() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("program", ["torch", "onnx"])
def test_a_learnt_prior_is_a_loop(tmp_path, program):
    model, path = vae(prior=MASKED), tmp_path / "a.file"
    model.save(tmp_path)
    # In a process whose functions are not wrapped for the checks of shapes: torch traces the loop's body as code.
    code = (
        "import sys; from pathlib import Path; from spikegen.vae import SpikingVAE\n"
        "from spikegen.export_sampler import write_sampler\n"
        "write_sampler(SpikingVAE.from_pretrained(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(path), program], check=True, capture_output=True)
    for count in (1, 2, 9):
        given = draws(model, count)
        made = torch.export.load(path).module()(*given) if program == "torch" else run_onnx(path, *given)
        torch.testing.assert_close(made, images(model, *given), rtol=0, atol=1e-5)
    assert made.std(0).mean() > 1e-3


def test_of_the_numbers_of_a_seed_it_draws_that_seeds_samples(tmp_path):
    from spikegen.draws import uniform_per_image

    model = vae()
    program = to_program(model, "torch").module()
    noise = uniform_per_image(7, 0, 10, model.noise_shape())
    made = program(noise, model.sample_labels(10, seed=7))
    torch.testing.assert_close(made, model.sample(10, seed=7), rtol=0, atol=1e-5)
    assert made.std(0).mean() > 1e-3


def test_exporting_leaves_the_model_as_it_was():
    model = vae().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.export.save(to_program(model, "torch"), buffer)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["relu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bernoulli", "ta"))]
)
def test_onnx_draws_the_models_images(tmp_path, name):
    model = vae(**MODELS[name])
    write_sampler(model, tmp_path / "a.onnx", "onnx")
    for count in (1, 2, 9):
        given = draws(model, count)
        torch.testing.assert_close(run_onnx(tmp_path / "a.onnx", *given), images(model, *given), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian", pytest.param("poisson", marks=pytest.mark.slow)])
def test_without_the_normal_distribution_onnx_holds_the_decoder(tmp_path, name):
    model = vae(**MODELS[name])
    says = write_sampler(model, tmp_path / "a.onnx", "onnx")
    assert says.startswith("spikes [2, B, 6] of the latent -> images")
    spikes = model.latent.sample(*draws(model, 7))
    torch.testing.assert_close(run_onnx(tmp_path / "a.onnx", spikes), model.decode(spikes), rtol=0, atol=1e-5)


def run_onnx(path, *inputs):
    session = onnxruntime.InferenceSession(path)
    names = [i.name for i in session.get_inputs()]
    (made,) = session.run(["images"], {k: v.numpy() for k, v in zip(names, inputs, strict=True)})
    return torch.from_numpy(made)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_the_packages_it_says_how_to_get_them(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}: pip install spikegen-vae\[onnx\]"):
        write_sampler(vae(), tmp_path / "a.onnx", "onnx")
    assert not list(tmp_path.iterdir())
