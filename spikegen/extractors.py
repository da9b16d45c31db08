"""Feature networks for scoring: the FID Inception, a small classifier per data set, FSVAE's autoencoders.

An extractor takes uint8 images [N, 3, H, W] of any size (grey ones repeated to three channels), does its own
resize and normalisation, and says in `settings()` which ones, so that a score can be compared with another.
"""

import io
import math
import sys
from dataclasses import dataclass
from http.client import HTTPException
from importlib import resources
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from spikegen.data import resize, to_model
from spikegen.spec import UserError, suggest
from spikegen.weights import one_line, read_weights, weights_hash

CNN_SIZES = {"digits": 16, "mnist": 32, "fashion_mnist": 32}
"""The data sets that have a shipped classifier, and the image size it was trained at, in pixels."""


@dataclass(frozen=True)
class Features:
    """What an extractor sees in N images: `features`, and class `logits` where it has classes."""

    features: Float[Tensor, "N d"]
    logits: Float[Tensor, "N k"] | None


class Extractor(nn.Module):
    """A fixed feature network, in eval mode, without gradients; subclasses are final."""

    frechet_name = "fid"
    """What the Frechet distance of its features is called."""

    def __init__(self, name: str, dim: int, resizing: str, antialias: bool, classes: int | None = None):
        super().__init__()
        self.name, self.dim = name, dim
        self.classes = classes
        """How many classes of the data it tells apart, where it was trained on them."""
        self.resizing, self.antialias = resizing, antialias
        self.weights_sha256 = ""

    def forward(self, images: UInt8[Tensor, "N 3 H W"]) -> Features:
        """Features (and logits) of uint8 images of any one size."""
        raise NotImplementedError

    def check(self, shape: tuple[int, int, int]) -> None:
        """UserError where images of `shape` = (channels, height, width) are not what it was made for; most resize."""

    @property
    def has_logits(self) -> bool:
        """Whether `forward` gives them."""
        return self.classes is not None

    def settings(self) -> dict[str, str | int | bool]:
        """What has to agree before two scores compare: name, weights' hash, resize, antialias, dim."""
        return {
            "name": self.name,
            "weights_sha256": self.weights_sha256,
            "resize": self.resizing,
            "antialias": self.antialias,
            "dim": self.dim,
        }


def load_extractor(name: str, data: str, device: torch.device | str) -> Extractor:
    """The extractor called `name` (cnn, inception[:PATH], autoencoder:PATH), on `device`, for scoring data set `data`.

    With `data` a "folder", cnn:NAME is that of data set NAME. UserError when there is no such extractor, none for this
    data set, or when its weights cannot be had.
    """
    kind, path = check_extractor(name, data)
    extractor: Extractor
    if kind == "inception":
        extractor = _load_inception(Path(path) if path else None)
    elif kind == "autoencoder":
        extractor = _load_autoencoder(Path(path))
    else:
        of = path or data
        extractor = CNNExtractor(load_cnn(of), CNN_SIZES[of])
    extractor.weights_sha256 = weights_hash(extractor.state_dict())
    return extractor.requires_grad_(False).eval().to(device)


def check_extractor(name: str, data: str) -> tuple[str, str]:
    """(kind, path or data set, if any) of an extractor's name; UserError where there is none such for this data set."""
    kind, _, path = name.partition(":")
    if kind not in ("inception", "cnn") and not (kind == "autoencoder" and path):
        kinds = ["cnn", "cnn:NAME", "inception", "inception:PATH", "autoencoder:PATH"]
        raise UserError(f"extractor {name!r}: {suggest(name, kinds)}")
    if kind == "cnn" and path and data not in ("folder", path):
        raise UserError(f"extractor {name}: the real images are {data}'s, not {path}'s; use {default_extractor(data)}")
    if kind == "cnn" and (of := path or data) not in CNN_SIZES:
        sets = ", ".join(CNN_SIZES)
        right = f"cnn:NAME with one of {sets}, or inception" if data == "folder" else "inception"
        raise UserError(f"extractor {name}: no classifier for {of}, only for {sets}; use {right}")
    return kind, path


def default_extractor(data: str) -> str:
    """The extractor to use for data set `data` when none is chosen: its own small one, else Inception."""
    return "cnn" if data in CNN_SIZES else "inception"


# ---- cnn -------------------------------------------------------------------------------------------------


class SmallCNN(nn.Module):
    """A four-level classifier of grey images in [-1, 1], small enough to ship: 95 thousand parameters.

    Maps [N, 1, H, W] to features [N, 96] (the last activations, averaged over the image) and logits [N, 10].
    """

    widths = (24, 48, 64, 96)
    smallest = 8
    """Height and width of an image that its poolings leave a pixel of."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        levels: list[nn.Module] = []
        for inputs, outputs in zip((1, *self.widths), self.widths, strict=False):
            levels += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            levels += [nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*levels[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(self.widths[-1], num_classes)

    def forward(self, images: Float[Tensor, "N 1 H W"]) -> Features:
        """Features and logits of grey images in [-1, 1]."""
        features = self.body(images)
        return Features(features, self.classifier(features))

    def maps(self, images: Float[Tensor, "N 1 H W"]) -> list[Float[Tensor, "N c h w"]]:
        """The activations of every level, finest first."""
        found = []
        for layer in self.body:
            images = layer(images)
            if isinstance(layer, nn.ReLU):
                found.append(images)
        return found


class CNNExtractor(Extractor):
    """`SmallCNN` on images made grey and resized to the size it was trained at."""

    def __init__(self, network: SmallCNN, size: int):
        super().__init__("cnn", network.widths[-1], f"bilinear to {size}", antialias=True, classes=10)
        self.network, self.size = network.to(memory_format=torch.channels_last), size

    def forward(self, images: UInt8[Tensor, "N 3 H W"]) -> Features:
        """Features [N, 96] and logits [N, 10]."""
        return self.network(grey_input(images, self.size))


def grey_input(images: UInt8[Tensor, "N C H W"], size: int) -> Float[Tensor, "N 1 {size} {size}"]:
    """The mean over the channels of uint8 images, resized to `size` pixels and scaled to [-1, 1]."""
    return to_model(resize(_grey(images), size))


def _grey(images: UInt8[Tensor, "N C H W"]) -> UInt8[Tensor, "N 1 H W"]:
    return images.float().mean(dim=1, keepdim=True).round().to(torch.uint8)


def load_cnn(data: str) -> SmallCNN:
    """The shipped classifier of `data`, one of CNN_SIZES, on the CPU."""
    with resources.as_file(resources.files("spikegen") / "assets" / f"cnn_{data}.safetensors") as path:
        state = read_weights(path)
    network = SmallCNN()
    network.load_state_dict(state)
    return network


# ---- inception -------------------------------------------------------------------------------------------


class InceptionExtractor(Extractor):
    """torch-fidelity's FID Inception, which resizes as TensorFlow 1 did; its logits leave out the bias."""

    has_logits = True  # of ImageNet's classes, which are not the data's

    def __init__(self, network: FeatureExtractorInceptionV3):
        super().__init__("inception", 2048, "bilinear to 299 as TensorFlow 1", antialias=False)
        self.network = network

    def forward(self, images: UInt8[Tensor, "N 3 H W"]) -> Features:
        """Features [N, 2048] and logits [N, 1008]."""
        return Features(*self.network(images))


def _load_inception(path: Path | None) -> InceptionExtractor:
    path = path or _downloaded_inception()
    # The network's constructor unpickles the file it is given: so it gets one made here, of tensors only.
    weights = io.BytesIO()
    torch.save(read_weights(path), weights)
    weights.seek(0)
    try:
        return InceptionExtractor(
            FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
            )
        )
    except RuntimeError:  # load_state_dict, of other keys or shapes
        right = f"give torch-fidelity's {URL_INCEPTION_V3.rpartition('/')[2]}"
        raise UserError(f"{path}: not the weights of the FID Inception; {right}") from None


def _downloaded_inception() -> Path:
    """torch-fidelity's weights in the torch.hub cache, fetched (and their hash checked) the first time."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = path.stem.rpartition("-")[2]
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), prefix, progress=sys.stderr.isatty())
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: what came has another hash
        raise UserError(
            f"extractor inception: its weights are not in {path.parent} and cannot be downloaded "
            f"({one_line(error)}); connect once, or fetch {URL_INCEPTION_V3} elsewhere and give "
            f"--extractor inception:PATH ({', '.join(CNN_SIZES)} also have --extractor cnn, no download)"
        ) from None
    return path


# ---- autoencoder -----------------------------------------------------------------------------------------


class AutoencoderExtractor(Extractor):
    """The encoder of an FSVAE-style autoencoder, for the Frechet autoencoder distance (arXiv 2110.00375).

    Convolutions 3x3 /2 with BatchNorm and LeakyReLU, and a linear layer to the features; images in [-1, 1] at exactly
    the size it was made for, grey or RGB as its first convolution says.
    """

    frechet_name = "fad"

    def __init__(self, state: dict[str, Tensor]):
        levels = sum(key.startswith("encoder.") and key.endswith(".0.weight") for key in state)
        convs = [state[f"encoder.{i}.0.weight"] for i in range(levels)]
        dim, flat = state["latent_layer.weight"].shape
        side = math.isqrt(flat // convs[-1].shape[0])
        super().__init__("autoencoder", dim, "none", antialias=False)
        self.channels, self.size = convs[0].shape[1], side * 2**levels
        self.encoder = nn.Sequential(*(self._level(conv.shape[1], conv.shape[0]) for conv in convs))
        self.latent_layer = nn.Linear(flat, dim)
        self.load_state_dict({k: v for k, v in state.items() if k.startswith(("encoder.", "latent_layer."))})

    @staticmethod
    def _level(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.LeakyReLU()
        )

    def check(self, shape: tuple[int, int, int]) -> None:
        """UserError for images of another size or number of channels."""
        if shape != (own := (self.channels, self.size, self.size)):
            made, got = (f"{h}x{w} images with {c} channel{'s' * (c > 1)}" for c, h, w in (own, shape))
            raise UserError(f"extractor autoencoder: made for {made}, not {got}")

    def forward(self, images: UInt8[Tensor, "N 3 H W"]) -> Features:
        """Features [N, d]; UserError for images of another size."""
        self.check((self.channels, *images.shape[2:]))
        images = images[:, : self.channels]  # of three equal ones, where the images are grey
        return Features(self.latent_layer(self.encoder(to_model(images)).flatten(1)), None)


def _load_autoencoder(path: Path) -> AutoencoderExtractor:
    state = read_weights(path)
    try:
        return AutoencoderExtractor(state)
    except (KeyError, IndexError, ValueError, RuntimeError):  # other keys or shapes
        raise UserError(
            f"{path}: not the weights of FSVAE's autoencoder (encoder.0.0.weight, latent_layer.weight)"
        ) from None
