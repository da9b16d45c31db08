"""Downloads: what comes is checked, what does not come is said in one line and soon."""

import shutil
import socket
from pathlib import Path

import pytest
from torchvision import datasets

from spikegen import downloads
from spikegen.data import DataSpec
from spikegen.downloads import fetch, fetch_celeba
from tests.inputs import mistake


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_absent_data_says_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(url: str, *_: object) -> None:
        print("Downloading", url)
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(downloads, "download_url", refuse)
    spec, offline = [DataSpec(name=name, root=tmp_path, download=download) for download in (True, False)]
    mistake(lambda: spec.load("test"), str(tmp_path), "data.root", "no route to host")
    mistake(lambda: offline.load("test"), str(tmp_path), "data.root", "data.download is off")
    assert capsys.readouterr().out == ""
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_downloads_are_checked_and_put_in_place(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(url: str, folder: Path, name: str, md5: str) -> None:
        assert url.startswith("http")
        shutil.copyfile(real_data / "MNIST" / "raw" / url.rsplit("/", 1)[1], folder / name)

    monkeypatch.setenv("SPIKEGEN_DATA", str(tmp_path / "own"))
    monkeypatch.setattr(downloads, "download_url", copy)
    assert len(DataSpec(name="mnist").load("test")) == 10_000
    names = sorted(p.name for p in (tmp_path / "own" / "MNIST" / "raw").iterdir())
    assert names == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, but never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.gz"
        mistake(lambda: fetch([url, url], tmp_path / "x.gz", "0" * 32, tmp_path, True), "x.gz", "timed out")
    assert socket.getdefaulttimeout() is None
    assert not list(tmp_path.iterdir())


class NoCelebA:
    """torchvision's CelebA when Google Drive refuses."""

    file_list = [("id", "0" * 32, "list_attr_celeba.txt")]

    def __init__(self, root: Path, download: bool) -> None:
        print("Too many users have viewed or downloaded this file recently")
        raise RuntimeError("quota exceeded\nmore")


def test_celeba_that_cannot_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets, "CelebA", NoCelebA)
    spec = DataSpec(name="celeba", root=tmp_path)
    mistake(lambda: spec.load("test"), "quota exceeded", "by hand", str(tmp_path / "celeba"))
    assert capsys.readouterr().out == ""
    (tmp_path / "celeba").mkdir()
    mine = tmp_path / "celeba" / "list_attr_celeba.txt"
    mine.write_text("my own")  # downloading would overwrite it: so it is not tried
    fetch_celeba(tmp_path)
    mistake(lambda: spec.load("test"), "lacks img_align_celeba")
    assert mine.read_text() == "my own"
