"""Drawing with other settings than the model was saved with equals a model saved with those."""

import sys
import warnings

import pytest
import torch
from spikegen.cli import entry

from spikegen.data import to_model, to_uint8
from spikegen.draws import GOLDEN_RATIO
from spikegen.plots import write_images
from spikegen.prior import MaskedSpec
from spikegen.sampling import Sampling, generate
from spikegen.scoring import score
from spikegen.spec import UserError
from spikegen.threshold_norm import ThresholdNorm
from spikegen.vae import ModelConfig, SpikingVAE
from tests.inputs import fill


def model(prior=True, **network):
    config = {
        "num_steps": 2,
        "stages": [{"channels": 3}, {"channels": 5}],
        "latent": {"kind": "spatial", "channels": 2},
        "conditional": True,
    }
    torch.manual_seed(1)
    vae = SpikingVAE(ModelConfig.model_validate(config), (1, 8, 8), ("cat", "dog"))
    if prior:
        vae.add_prior(MaskedSpec(**{"channels": 8, "heads": 2, "blocks": 1, "passes": 3} | network))
        torch.nn.init.normal_(vae.prior.readout.weight)
        fill(vae.prior.mixture)
    for module in vae.modules():
        if isinstance(module, ThresholdNorm):  # as lively as after training
            module.running_var.fill_(0.05)
    vae.eval()
    if prior:  # of each class about half
        margin = vae.classify(vae.sample(64, seed=9)).diff(dim=1).median()
        with torch.no_grad():
            vae.head.linear.bias[0] += margin
    return vae


def drawn(vae, **sampling):
    return torch.cat(list(generate(vae, 70, seed=3, sampling=Sampling(**sampling))))


@pytest.mark.parametrize("setting", [{"passes": 7}, {"temperature": 0.3}, {"guidance": 1.5}], ids=str)
def test_a_setting_equals_a_model_saved_with_it(setting):
    found = drawn(model(), **setting)
    assert torch.equal(found, drawn(model(**setting)))
    assert not torch.equal(found, drawn(model()))
    vae = model()
    Sampling(**setting).set(vae)
    assert Sampling().settings(vae) == Sampling().settings(model(**setting))
    assert Sampling().settings(vae).items() >= setting.items()


@pytest.mark.parametrize(
    "bad", [["--temperature", "nan"], ["--guidance", "inf"], ["--passes", "0"], ["--candidates", "0"]], ids=str
)
@pytest.mark.parametrize("verb", ["sample", "score"])
def test_numbers_that_cannot_be_are_one_line(bad, verb, tmp_path, monkeypatch, capfd):
    model().save(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["spikegen", verb, str(tmp_path / "model"), *bad, "--device", "cpu"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which the command replaces
    with pytest.raises(SystemExit) as ended:
        entry()
    said = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert len(said) == 1
    assert bad[0].lstrip("-") in said[0]


@pytest.mark.filterwarnings("ignore::spikegen.requirements.ScoreWarning")
def test_a_score_draws_so_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKEGEN_DATA", str(tmp_path / "data"))
    asked = {"reference": "digits", "num": 150, "metrics": ("fid",), "extractor": "cnn", "device": "cpu"}
    for name, network in (("usual", {}), ("seven", {"passes": 7})):
        model(**network).save(tmp_path / name)
    usual = score(tmp_path / "usual", **asked)
    seven = score(tmp_path / "seven", **asked)
    found = score(tmp_path / "usual", **asked, sampling=Sampling(passes=7))
    assert found.metrics == seven.metrics != usual.metrics
    assert found.settings["sampling"] == {
        "precision": "fp32",
        "candidates": 1,
        "passes": 7,
        "schedule": 4.0,
        "temperature": 1.0,
        "guidance": 0.0,
    }
    write_images(generate(model(), 150), tmp_path / "images")
    with pytest.raises(UserError, match="folder of images, which nothing draws: omit --passes, --precision"):
        score(tmp_path / "images", **asked, sampling=Sampling(passes=7, precision="bf16"))


def test_bf16_is_of_the_samples_alone():
    exact, batches = drawn(model()), generate(model(), 70, seed=3, sampling=Sampling(precision="bf16"))
    found = [next(batches)]
    assert not torch.is_autocast_enabled("cpu")
    found = torch.cat([*found, *batches])
    assert found.dtype == torch.uint8
    assert not torch.equal(found, exact)
    # a bit that rounding turns changes its image; most images have none
    assert (found.int() - exact.int()).abs().float().median() <= 2


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.filterwarnings("ignore:this model has no learnt prior")
def test_candidates_redraw_what_the_head_does_not_recognise(prior):
    vae = model(prior)
    once, twice, often = (drawn(vae, candidates=n) for n in (1, 2, 30))
    labels = vae.sample_labels(70, seed=3)
    right = [vae.classify(to_model(images)).argmax(1) == labels for images in (once, twice, often)]
    wrong = ~right[0]
    assert 10 < wrong.sum() < 60
    assert torch.equal(once[~wrong], twice[~wrong])
    again = vae.redraw(wrong.nonzero()[:, 0].tolist(), labels[wrong], seed=3 + GOLDEN_RATIO)
    assert torch.equal(to_uint8(again), twice[wrong])
    assert right[0].sum() <= right[1].sum() <= right[2].sum()
    assert not prior or right[0].sum() < right[2].sum()  # the latent's own images are all of one class here
    # none depends on how many there are
    few = torch.cat(list(generate(vae, 5, seed=3, sampling=Sampling(candidates=30))))
    assert torch.equal(few, often[:5])


def test_a_redrawn_sample_is_that_of_its_seed_in_any_company_and_any_mode():
    vae = model()
    labels = vae.sample_labels(40, seed=5)
    expected = vae.sample(40, seed=5)
    which = [3, 39, *range(8, 30)]  # a full group and a part of one
    torch.testing.assert_close(vae.redraw(which, labels[which], seed=5), expected[which])
    alone = vae.redraw([39], labels[[39]], seed=5)
    assert torch.equal(vae.train().redraw([39], labels[[39]], seed=5), alone)
    assert vae.training
    torch.testing.assert_close(alone[0], expected[39])


@pytest.mark.parametrize("label", [0, 1])
def test_candidates_of_a_given_label(label):
    vae, right = model(), []
    for candidates in (1, 5):
        images = torch.cat(list(generate(vae, 40, label=label, sampling=Sampling(candidates=candidates))))
        right.append((vae.classify(to_model(images)).argmax(1) == label).sum())
    assert right[0] < right[1]


def test_settings_that_a_model_cannot_have_are_refused():
    with pytest.raises(UserError, match=r"no learnt prior: omit --passes, --guidance"):
        drawn(model(prior=False), passes=3, guidance=1.0)
    with pytest.raises(UserError, match=r"guidance 1\.0 needs a prior trained with .* outline_dropout above 0"):
        drawn(model(outline_dropout=0), guidance=1.0)
    headless = model()
    headless.head = None
    with pytest.raises(UserError, match="--candidates is for models with labels and a classifier head"):
        drawn(headless, candidates=2)
