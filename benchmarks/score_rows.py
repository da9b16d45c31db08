"""What surrounds the model: FID, and the batches of data."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from benchmarks.checks import same
from benchmarks.steps import build, fsvae, training_step
from benchmarks.table import Line, line
from benchmarks.timing import Setting, race
from spikegen.extractors import Extractor, load_extractor
from spikegen.features import extract
from spikegen.images import ImageSet
from spikegen.loop import training_batch
from spikegen.metrics import frechet_distance, statistics_of
from spikegen.references import BATCH


class _FeaturesAlone(nn.Module):
    """An extractor as torchmetrics wants its own."""

    def __init__(self, extractor: Extractor):
        super().__init__()
        self.extractor, self.num_features = extractor, extractor.dim

    def forward(self, images: Tensor) -> Tensor:
        """Features of uint8 images."""
        return self.extractor(images).features


def score(setting: Setting) -> Iterator[Line]:
    """FID with the small extractor; ours gives an interval as well, from 20 resamples."""
    count = 200 if setting.quick else 2000
    generator = torch.Generator().manual_seed(0)
    real, generated = (
        torch.randint(0, 256, (count, 1, 32, 32), generator=generator, dtype=torch.uint8) // k for k in (1, 2)
    )
    extractor = load_extractor("cnn", "mnist", setting.device)

    def ours() -> float:
        reference = statistics_of(extract(iter(real.split(BATCH)), extractor).features)
        return frechet_distance(extract(iter(generated.split(BATCH)), extractor).features, reference).value

    @torch.no_grad()
    def torchmetrics() -> float:
        metric = FrechetInceptionDistance(_FeaturesAlone(extractor)).to(setting.device)
        for images, is_real in ((real, True), (generated, False)):
            for batch in images.split(BATCH):
                metric.update(batch.expand(-1, 3, -1, -1).to(setting.device), real=is_real)
        return metric.compute().item()

    found = [{"FID": torch.tensor(each())} for each in (ours, torchmetrics)]
    same("score, torchmetrics", *found, tolerance=1e-3)
    seconds = race({"ours": ours, "torchmetrics": torchmetrics}, setting, warm_up=1)
    yield line("score", f"FID, `cnn`, {count} generated and {count} real 32x32", seconds, images=2 * count)


def data(setting: Setting) -> Iterator[Line]:
    """A batch out of 60,000 images, beside the training step that it is for."""
    batch = 4 if setting.quick else 32
    config = fsvae(setting)
    config = config.model_copy(update={"training": config.training.model_copy(update={"batch_size": batch})})
    size, device = config.data.image_size, torch.device(setting.device)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60_000, 1, size, size), generator=generator, dtype=torch.uint8).to(device)
    images = ImageSet(pixels, torch.arange(60_000, device=device) % 10, config.data.class_names())
    model = build(config, setting.device).train()

    def fetch() -> Tensor:
        return training_batch(images, config, 0, batch, device, slice(0, batch))[0]

    step = training_step(model, config, fetch(), None, setting, bf16=True)
    seconds = race({"ours": fetch, "step": step}, setting)
    share = f"{seconds['ours'] / seconds.pop('step'):.2%} of a training step in bf16"
    yield line("data", f"batch of {batch} of 60,000 images {size}x{size}", seconds, images=batch, besides=(share,))
