"""What TCJA costs: a training step of a preset with and without its attention blocks, alternating in one process.

python -m benchmarks.attention_cost mnist --batch 50 --repeats 15 --threads 1
"""

import platform
import statistics
import time

import click
import torch

from spikegen.config import Config, load_config
from spikegen.objective import loss_parts, total_loss
from spikegen.training import build_model
from spikegen.vae import SpikingVAE


def step(model: SpikingVAE, config: Config, image: torch.Tensor, label: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=config.training.precision == "bf16"):
        output = model(image, label)
    total_loss(loss_parts(output, image, label, config.training.losses)).backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


@click.command()
@click.argument("preset", default="mnist")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
@click.option("--batch", default=50, show_default=True)
@click.option("--repeats", default=15, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(preset: str, overrides: tuple[str, ...], batch: int, repeats: int, threads: int) -> None:
    """Print the median step time with and without attention, and their ratio."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    configs = [load_config(preset, [*overrides, extra]) for extra in ("model.engine=torch", "model.attention=null")]
    models = [build_model(c, c.data.class_names()).train() for c in configs]
    image = torch.rand(batch, *models[0].image_shape) * 2 - 1
    label = torch.randint(max(len(models[0].classes), 1), (batch,))
    times: list[list[float]] = [[], []]
    for repeat in range(repeats + 2):
        for which, (model, config) in enumerate(zip(models, configs, strict=True)):
            seconds = step(model, config, image, label)
            if repeat >= 2:  # the first two warm up
                times[which].append(seconds)
    with_blocks, without = (statistics.median(t) for t in times)
    click.echo(
        f"{preset}, batch {batch}, {threads} threads, torch {torch.__version__}, {platform.processor() or 'cpu'}"
    )
    click.echo(
        f"with TCJA {with_blocks * 1e3:.1f} ms, without {without * 1e3:.1f} ms, ratio {with_blocks / without:.3f}"
    )


if __name__ == "__main__":
    main()
