"""Train the small classifier that scores a data set: its weights ship in spikegen/assets.

    python tools/train_cnn.py mnist --data-root ROOT

The test split is looked at once, at the end. The command and the accuracy are kept in the weights' metadata.
"""

import json
import math
import time
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from spikegen.data import DataSpec, to_model
from spikegen.extractors import CNN_SIZES, SmallCNN
from spikegen.storage import replacing

EPOCHS = {"digits": 150, "mnist": 6, "fashion_mnist": 10}
ASSETS = Path(__file__).parents[1] / "spikegen" / "assets"


@click.command()
@click.argument("name", type=click.Choice(sorted(CNN_SIZES)))
@click.option("--data-root", type=click.Path(path_type=Path), help="Folder of the data sets.")
@click.option("--epochs", type=click.IntRange(1), help="Passes over the training split; default by data set.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write; default spikegen/assets.")
def main(name: str, data_root: Path | None, epochs: int | None, out: Path | None) -> None:
    """Train the classifier for data set NAME and write its weights."""
    epochs = epochs or EPOCHS[name]
    data = DataSpec(name=name, root=data_root, image_size=CNN_SIZES[name])
    train, test = data.load("train"), data.load("test")
    torch.manual_seed(0)
    network = SmallCNN(len(train.classes))
    fit(network, to_model(train.images), train.labels, epochs, flip=name == "fashion_mnist")
    accuracy = evaluate(network, to_model(test.images), test.labels)
    metadata = {
        "data": name,
        "test_accuracy": f"{accuracy:.4f}",
        "image_size": str(CNN_SIZES[name]),
        "classes": json.dumps(train.classes),
        "command": f"python tools/train_cnn.py {name} --epochs {epochs}",
    }
    with replacing(out or ASSETS / f"cnn_{name}.safetensors") as beside:
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, beside, metadata)
    click.echo(f"{name}: {accuracy:.2%} of the test split")


def fit(network: SmallCNN, images: Tensor, labels: Tensor, epochs: int, flip: bool) -> None:
    """Train in place on images [N, 1, H, W] in [-1, 1] and labels [N]."""
    batch = 128
    steps = len(images) // batch
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=epochs * steps)
    network.train().to(memory_format=torch.channels_last)  # nearly twice as fast on a CPU
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for chosen in torch.randperm(len(images))[: steps * batch].view(steps, batch):
            inputs = augment(images[chosen], flip).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):  # twice as fast again
                logits = network(inputs).logits
            loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if epoch % max(1, epochs // 20) == 0:
            seconds = time.perf_counter() - start
            click.echo(f"epoch {epoch}: loss {total / steps:.4f}, {seconds:.1f} s", err=True)


def augment(images: Tensor, flip: bool) -> Tensor:
    """Shift by up to 6 % of the size; rotate by up to 10 degrees or, for clothes, mirror every other one."""
    n = len(images)
    angle = (torch.rand(n) * 2 - 1) * math.radians(0 if flip else 10)
    mirror = torch.where(torch.rand(n) < 0.5, -1.0, 1.0) if flip else torch.ones(n)
    shift = (torch.rand(n, 2, 1) * 2 - 1) * 0.12  # the grid is two units wide
    turn = torch.stack([angle.cos() * mirror, -angle.sin(), angle.sin() * mirror, angle.cos()], 1)
    grid = F.affine_grid(torch.cat([turn.view(n, 2, 2), shift], 2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def evaluate(network: SmallCNN, images: Tensor, labels: Tensor) -> float:
    """The fraction of `images` classified right."""
    network.eval()
    predicted = torch.cat([network(part).logits.argmax(1) for part in images.split(500)])
    return (predicted == labels).float().mean().item()


if __name__ == "__main__":
    main()
