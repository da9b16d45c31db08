"""What every test runs under: shapes checked, few threads, and a data folder that is never the user's."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# Before spikegen's first import, in whichever test file that is: all its annotations are then checked.
install_import_hook("spikegen", "beartype.beartype")

# Without a GPU, engine `triton` runs in Triton's interpreter; set before triton's first import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))  # more threads than free cores wait for each other
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # for the commands that tests start

# What was started in the background ignores these, and so would every training that a test interrupts.
for signum, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, default)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True, scope="session")
def _own_data_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Point `data.root` at an empty folder: the user's data sets are neither read nor written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIKEGEN_DATA", str(tmp_path_factory.mktemp("data-root")))
        yield


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `data.root` with the official `MNIST/raw/*.gz` and `FashionMNIST/raw/*.gz`, linked: write beside.

    They come from $SPIKEGEN_TEST_DATA, else shared/data beside the checkout; absent, the test is skipped.
    """
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    source = Path(os.environ.get("SPIKEGEN_TEST_DATA") or beside).resolve()
    files = [f for name in ("MNIST", "FashionMNIST") for f in sorted(source.glob(f"{name}/raw/*.gz"))]
    if len(files) != 8:
        pytest.skip("needs MNIST/raw/*.gz and FashionMNIST/raw/*.gz: name their folder in SPIKEGEN_TEST_DATA")
    root = tmp_path_factory.mktemp("real-data")
    for file in (f for f in source.rglob("*") if f.is_file()):
        link = root / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    return root
