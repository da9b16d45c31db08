"""The same network without spikes and without time: what spiking costs."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spikegen.vae import ModelConfig


class ANNVAE(nn.Module):
    """The convolutions of the spiking one with BatchNorm and ReLU, around a Gaussian latent of the same size."""

    def __init__(self, model: ModelConfig, image_size: int):
        super().__init__()
        widths = [1, *(stage.channels for stage in model.stages)]
        side, self.size = image_size // model.reduction, model.latent.size
        features = widths[-1] * side**2
        encoder: list[nn.Module] = []
        for i, o in itertools.pairwise(widths):
            encoder += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
        self.encoder = nn.Sequential(*encoder, nn.Flatten())
        self.moments = nn.Linear(features, 2 * self.size)
        decoder: list[nn.Module] = [nn.Linear(self.size, features), nn.Unflatten(1, (widths[-1], side, side))]
        for i, o in zip(widths[:0:-1], [*widths[-2:0:-1], widths[1]], strict=True):
            up = nn.ConvTranspose2d(i, o, 3, stride=2, padding=1, output_padding=1)
            decoder += [up, nn.BatchNorm2d(o), nn.ReLU()]
        self.decoder = nn.Sequential(*decoder, nn.Conv2d(widths[1], 1, 3, padding=1), nn.Tanh())

    def loss(self, image: Tensor) -> Tensor:
        """Reconstruction and KL, drawn anew."""
        mean, log_var = self.moments(self.encoder(image)).chunk(2, 1)
        recon = self.decoder(mean + (log_var / 2).exp() * torch.randn_like(mean))
        return F.mse_loss(recon, image) - 0.5 * (1 + log_var - mean.square() - log_var.exp()).mean()

    @torch.no_grad()
    def sample(self, num: int) -> Tensor:
        """Images from the prior."""
        return self.decoder(torch.randn(num, self.size, device=self.moments.weight.device))
