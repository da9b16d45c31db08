"""Drawing with other settings than the model was saved with equals a model saved with those."""

import pytest
import torch

from spikegen.prior import MaskedSpec
from spikegen.sampling import Sampling, generate
from spikegen.spec import UserError
from spikegen.stages import ThresholdNorm
from spikegen.vae import ModelConfig, SpikingVAE


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
        torch.nn.init.normal_(vae.prior.label.weight)
    for module in vae.modules():
        if isinstance(module, ThresholdNorm):  # as lively as after training
            module.running_var.fill_(0.05)
    return vae.eval()


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


def test_bf16_is_of_the_samples_alone():
    exact, batches = drawn(model()), generate(model(), 70, seed=3, sampling=Sampling(precision="bf16"))
    found = [next(batches)]
    assert not torch.is_autocast_enabled("cpu")
    found = torch.cat([*found, *batches])
    assert found.dtype == torch.uint8
    assert not torch.equal(found, exact)
    # a bit that rounding turns changes its image; most images have none
    assert (found.int() - exact.int()).abs().float().median() <= 2


def test_settings_that_a_model_cannot_have_are_refused():
    with pytest.raises(UserError, match=r"no learnt prior: omit --passes, --guidance"):
        drawn(model(prior=False), passes=3, guidance=1.0)
    with pytest.raises(UserError, match=r"guidance 1\.0 needs a prior trained with .* label_dropout above 0"):
        drawn(model(label_dropout=0), guidance=1.0)
