"""Named ways to score: what a paper fixed, so that its figures and ours are of the same thing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """How many images, which metrics, and what kind of extractor."""

    name: str
    num: int
    metrics: tuple[str, ...]
    extractor: str
    hint: str
    """Where the extractor's weights come from."""


PROTOCOLS = {
    # 20 batches of 256 against the test split's features of the authors' autoencoder, without a resize; the error of
    # reconstructions on [-1, 1]. The paper's FID (clean-fid) and IS (unnormalised torchvision Inception) are not had.
    "fsvae": Protocol(
        "fsvae",
        5120,
        ("fad", "fad_floor", "mse", "psnr", "ssim"),
        "autoencoder",
        "the weights that FSVAE's authors publish, with --statistics for their .npz of the test split",
    ),
}
"""By name; `fsvae` is that of FSVAE and ESVAE (arXiv 2110.00375, 2310.14839)."""
