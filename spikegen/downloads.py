"""Downloads of published files: checked by their MD5, quiet, and given up when the network is silent."""

import contextlib
import io
import shutil
import socket
import sys
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

from torchvision import datasets
from torchvision.datasets.utils import check_integrity, download_url

from spikegen.spec import UserError
from spikegen.storage import replacing, user_mistakes

TIMEOUT = 15.0  # seconds without an answer; torchvision itself would wait for ever


def fetch(urls: list[str], path: Path, md5: str, root: Path, download: bool) -> None:
    """Download `path` from the first of the mirrors that has it, checked by its MD5.

    UserError when none has it or `download` is off; it names `root`, the setting that may be wrong.
    """
    reason = "data.download is off"
    for url in urls if download else []:
        try:
            with replacing(path) as beside, _downloading():
                download_url(url, beside.parent, beside.name, md5)
            return
        except (OSError, RuntimeError, HTTPException) as error:
            reason = f"downloading failed: {_first_line(error)}"
    raise UserError(f"{path} is absent ({reason}); put it there, set data.root (now {root}), or connect to the network")


def fetch_celeba(root: Path) -> None:
    """Let torchvision put CelebA's files into ROOT/celeba, unless it would overwrite others so named."""
    folder, files = root / "celeba", datasets.CelebA.file_list
    if any((folder / name).exists() and not check_integrity(folder / name, md5) for _, md5, name in files):
        return
    try:
        with _downloading():
            datasets.CelebA(root, download=True)
    except Exception as error:  # gdown, which torchvision calls, has exceptions of its own
        hand = "put img_align_celeba and the list_*.txt files there by hand, or set data.root"
        raise UserError(f"{folder}: downloading CelebA failed ({_first_line(error)}); {hand}") from None


def require_published(path: Path, md5: str) -> None:
    """UserError unless `path` is the published file."""
    with user_mistakes("read", path):
        if not check_integrity(path, md5):
            raise damaged(path)


def damaged(path: Path) -> UserError:
    """The error for a file that is not what was published."""
    return UserError(f"{path}: damaged, or not the published file; delete it and put the right one there")


@contextlib.contextmanager
def _downloading() -> Iterator[None]:
    """Keep what torchvision prints off stdout, which is for results, and off a stderr that nobody watches.

    Its sockets time out here.
    """
    out = sys.stderr if sys.stderr.isatty() else io.StringIO()
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            yield
    finally:
        socket.setdefaulttimeout(before)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def not_installed(error: ImportError) -> UserError:
    """The error for event data without the packages that read it."""
    return UserError(f"this event data needs the package {error.name}: pip install spikegen-vae[events]")


def fetch_recordings(dataset: str, split: str, folder: Path, root: Path, download: bool) -> None:
    """Let tonic download and unpack its data set of that name, then move the unpacked one to `folder`.

    It is unpacked beside, so that `folder` is there whole or not at all. UserError: off, or it failed.
    """
    if not download:
        raise UserError(f"{folder} is absent (data.download is off); put it there, or set data.root (now {root})")
    beside = root / f".{dataset}.part"
    inside = beside / folder.relative_to(root)
    try:
        with _downloading():
            _unpack(dataset, split, beside, inside)
    except ImportError as error:
        raise not_installed(error) from None
    except Exception as error:  # tonic lets through what its downloads and unpackers raise
        raise UserError(f"{folder}: downloading failed ({_first_line(error)}); put it there by hand") from None
    with user_mistakes("write", folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        inside.rename(folder)
        shutil.rmtree(beside)


def _unpack(dataset: str, split: str, beside: Path, inside: Path) -> None:
    import tonic
    from tonic.download_utils import extract_archive

    kind = getattr(tonic.datasets, dataset)
    if dataset in ("DVSGesture", "NMNIST"):
        kind(str(beside), train=split == "train")
    else:
        kind(str(beside))
    if not inside.is_dir():  # N-Caltech101's archive holds another, which tonic leaves packed
        (packed,) = beside.rglob(f"{inside.name}.zip")
        extract_archive(str(packed), str(inside.parent))
