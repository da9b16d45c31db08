"""spikegen score: a table and a path on success; a mistake is one line on stderr and exit code 2."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from spikegen.cli import entry

from spikegen.runs import scores_path
from spikegen.training import train
from tests.inputs import picture
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, shared: only the first test lets scores.json go into it."""
    folder = tmp_path_factory.mktemp("score") / "run"
    train(tiny_config(), folder, device="cpu")
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Call `spikegen score` with these arguments: the exit code, stdout and stderr."""

    def calling(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["spikegen", "score", *map(str, arguments), "--device", "cpu"])
        with warnings.catch_warnings():  # which also puts back the command's showwarning
            warnings.simplefilter("default")
            with pytest.raises(SystemExit) as ended:
                entry()
        said = capfd.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return calling


def refused(result: tuple[int, str, str], says: str) -> None:
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert says in err


def test_a_run_gets_a_table_and_scores_in_its_folder(call, run):
    code, out, err = call(run, "--num", 120)
    *table, made, path = out.splitlines()
    assert code == 0
    assert all(line.startswith("Warning: ") for line in err.splitlines())  # few images, of a model hardly trained
    assert Path(path) == run / "scores.json"
    held = json.loads(Path(path).read_text())
    assert [line.split()[0] for line in table] == list(held["metrics"])
    assert {"fid", "fid_floor", "is", "mse"} <= set(held["metrics"])
    assert held["settings"]["num_generated"] == 120
    sha = held["settings"]["extractor"]["weights_sha256"][:8]
    assert made == f"360 real images of digits (test); 120 generated; extractor cnn {sha}; protocol spikegen; seed 0"


def test_earlier_scores_are_kept_and_nothing_else_is_replaced(call, run, tmp_path):
    out = tmp_path / "scores.json"
    chosen = [("--num", 50, "--metrics", "is"), ("--metrics", "mse"), ("--metrics", "mse"), ("--metrics", "psnr")]
    for options in chosen:
        assert call(run, *options, "--out", out)[0] == 0
    held = {f.name: list(json.loads(f.read_text())["metrics"]) for f in tmp_path.iterdir()}
    assert held == {"scores-1.json": ["is"], "scores-2.json": ["mse"], "scores.json": ["psnr"]}
    other = tmp_path / "config.json"
    other.write_text('{"model": 3}')
    refused(call(run, "--metrics", "mse", "--out", other), "what it holds is no score")
    assert other.read_text() == '{"model": 3}'


def test_the_choices_are_heeded(call, run, tmp_path):
    out = tmp_path / "new" / "mine.json"
    code, said, _ = call(run, "--num", 110, "--metrics", "is,kid", "--reference", "digits:train", "--out", out)
    held = json.loads(out.read_text())
    assert code == 0
    assert said.splitlines()[-1] == str(out)
    assert list(held["metrics"]) == ["is", "kid"]
    assert held["settings"]["split"] == "train"


def test_a_model_that_learnt_with_its_judge_is_told_apart(call, run, tmp_path):
    learnt = tmp_path / "run"
    shutil.copytree(run, learnt)
    text = (learnt / "config.yaml").read_text()
    assert text.count("perceptual: 0.0") == 1
    (learnt / "config.yaml").write_text(text.replace("perceptual: 0.0", "perceptual: 0.5"))
    for given, flattered, says in (
        ((run,), False, ""),
        ((learnt,), True, "very extractor: what it measures flatters"),
        ((learnt / "model", "--reference", "digits"), None, "is not known"),  # nothing there says how it learnt
        ((learnt, "--extractor", "cnn:digits"), True, "very extractor: what it measures flatters"),
    ):
        out = tmp_path / "scores.json"
        _, said, _ = call(*given, "--num", 20, "--metrics", "is", "--out", out)
        assert json.loads(out.read_text())["settings"]["learnt_with_extractor"] is flattered
        assert says in said
        assert ("flatter" in said) is (flattered is not False)


def test_few_images_are_warned_of_in_one_line(call, run, tmp_path):
    code, out, err = call(run, "--num", 50, "--metrics", "fid", "--out", tmp_path / "scores.json")
    assert code == 0
    assert out.startswith("fid ")
    assert err.startswith("Warning: FID needs more images than the extractor's 96 features")
    assert err.count("FID needs") == 1, err


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        (("--metrics", "fdi"), "there is no 'fdi'; did you mean fid?"),
        (("--metrics", ""), "there is no ''"),
        (("--reference", "nosuch"), "neither a folder nor a data set's name"),
        (("--extractor", "cn"), "did you mean cnn?"),
        (("--num", "1"), "'--num'"),
    ],
)
def test_a_wrong_choice_is_one_line(call, run, tmp_path, choice, says):
    refused(call(run, "--out", tmp_path / "scores.json", *choice), says)
    assert not (tmp_path / "scores.json").exists()


def test_inception_offline_is_one_line(call, run, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    refused(call(run, "--extractor", "inception"), "cannot be downloaded")


def test_a_folder_without_images_is_one_line(call, tmp_path):
    refused(call(tmp_path), "give --reference")
    refused(call(tmp_path, "--reference", "digits"), "holds no images")


def test_a_folder_of_fewer_images_than_asked_for_is_one_line(call, tmp_path):
    for k in range(3):
        picture(tmp_path / f"{k}.png", 16, 16, "L")
    refused(call(tmp_path, "--reference", "digits", "--num", 4), "has only 3 images")


def test_two_folders_are_scored_without_a_download(call, tmp_path):
    for name in ("made", "real"):
        for k in range(4):
            picture(tmp_path / name / f"{k}.png", 16, 16, "L")
    chosen = ("--extractor", "cnn:digits", "--metrics", "fid", "--out", tmp_path / "scores.json")
    code, out, _ = call(tmp_path / "made", "--reference", tmp_path / "real", *chosen)
    assert code == 0
    assert "extractor cnn" in out


def test_a_broken_image_is_named(call, tmp_path):
    for k in range(3):
        picture(tmp_path / f"{k}.png", 16, 16, "L")
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    refused(call(tmp_path, "--reference", "digits"), "1.png: cannot be read as an image")


def test_a_folder_of_images_is_not_written_into(call, tmp_path, monkeypatch):
    for k in range(3):
        picture(tmp_path / "images" / f"{k}.png", 16, 16, "L")
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("images", "--reference", "digits", "--metrics", "kid")
    assert (code, out.splitlines()[-1]) == (0, "scores.json")
    assert (tmp_path / "scores.json").is_file()
    assert len(list((tmp_path / "images").iterdir())) == 3


def test_scores_go_into_runs_only(run, tmp_path):
    assert scores_path(str(run)) == run / "scores.json"
    for other in (run / "model", tmp_path, "someone/model"):
        assert scores_path(str(other)) == Path("scores.json")
