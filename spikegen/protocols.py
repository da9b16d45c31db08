"""Named ways to score: what a paper fixed, so that its figures and ours are of the same thing."""

from dataclasses import dataclass

from spikegen.spec import UserError


@dataclass(frozen=True)
class Published:
    """What a protocol's authors publish for one data set, known by its SHA-256."""

    weights: str
    """Of the extractor, as `weights_hash` has it."""
    statistics: str
    """Of the file of the test split's features."""


@dataclass(frozen=True)
class Protocol:
    """How many images, which metrics, and what kind of extractor."""

    name: str
    num: int
    metrics: tuple[str, ...]
    extractor: str
    hint: str
    """Where the extractor's weights come from."""
    published: dict[str, Published]
    """By data set, where its authors' files are known."""


PROTOCOLS = {
    # 20 batches of 256 against the test split's features of the authors' autoencoder, without a resize; the error of
    # reconstructions on [-1, 1]. The paper's FID (clean-fid) and IS (unnormalised torchvision Inception) are not had.
    "fsvae": Protocol(
        "fsvae",
        5120,
        ("fad", "fad_floor", "mse", "psnr", "ssim"),
        "autoencoder",
        "the weights that FSVAE's authors publish, with --statistics for their .npz of the test split",
        {
            "mnist": Published(
                "a88c1444b2eb4e43bf98f0ea6a681123a881f7b3ee37ded681536b2039f8d45d",
                "5d4dd72f345b4337af8ca3432dcf53e4b4b6e8f218aace6abd26dd0181473f20",
            ),
            "fashion_mnist": Published(
                "bd16222e3f2707391fdf6d15f852363e17444487455e10732ea57f0d55877ef6",
                "c3a0b1ff9340f947d8316d33d0f27cd5a565c007bc63ebdd88de0ff91f558645",
            ),
        },
    ),
}
"""By name; `fsvae` is that of FSVAE and ESVAE (arXiv 2110.00375, 2310.14839)."""


def check_published(
    protocol: Protocol | None, data: str, split: str | None, weights: str, statistics: str | None
) -> str | None:
    """UserError where published files are used for another data set or split, or statistics without their own weights.

    `weights` and `statistics` are SHA-256 as `Published` has them. Under a protocol, what keeps a score from being its
    authors' own kind, or None.
    """
    for other in PROTOCOLS.values():
        for name, files in other.published.items():
            if statistics == files.statistics and (data, split, weights) != (name, "test", files.weights):
                raise UserError(
                    f"--statistics: this file is of {name}'s test split by the weights that {other.name}'s authors "
                    f"publish for it; score {name} with those weights, or leave it out"
                )
            if weights == files.weights and data not in (name, "folder"):
                raise UserError(
                    f"--extractor: these weights are those that {other.name}'s authors publish for {name}; give those "
                    f"for {data}"
                )
    if protocol is None:
        return None
    if (known := protocol.published.get(data)) is None:
        return f"--protocol {protocol.name}: which files its authors publish for {data} is not known here"
    if weights != known.weights:
        return f"--protocol {protocol.name}: the extractor's weights are not those that its authors publish for {data}"
    if statistics != known.statistics:
        given = "not those that its authors publish" if statistics else "computed here, not its authors' own"
        return f"--protocol {protocol.name}: the statistics of {data} are {given}"
    return None
