import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from spikegen import cli, train
from spikegen.runs import Run
from spikegen.vae import SpikingVAE
from tests.tiny import tiny_config, tiny_flags


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(training__epochs=6, training__lr=5e-3)
    return train(config, tmp_path_factory.mktemp("runs") / "run", device="cpu")


@pytest.fixture
def spikegen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["spikegen", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.entry()
        out = capsys.readouterr()
        return int(left.value.code or 0), out.out, out.err

    return call


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from spikegen.cli import entry; entry()", *map(str, arguments)]


# ---- what works


def test_help_lists_the_verbs_without_importing_torch() -> None:
    code = "import sys, spikegen.cli as c\ntry: c.entry()\nfinally: print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(verb in out for verb in cli.COMMANDS)
    assert out.splitlines()[-1] == "False"


def test_configs_lists_every_preset(spikegen) -> None:
    code, out, _ = spikegen("configs")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} >= {"digits", "mnist", "fsvae_mnist", "tcja_celeba"}


def test_a_dry_run_prints_a_config_that_loads(spikegen, tmp_path: Path) -> None:
    code, out, err = spikegen("train", "digits", "--set", "training.epochs=7", "--dry-run")
    assert code == 0
    assert "parameters" in err
    (tmp_path / "c.yaml").write_text(out)
    again = spikegen("train", tmp_path / "c.yaml", "--dry-run")
    assert again[1] == out
    assert "epochs: 7" in out


def test_a_dry_run_counts_the_mixture_too(spikegen) -> None:
    err = spikegen(
        "train", "mnist", "--set", "prior.network.components=3", "--set", "prior.network.directions=7", "--dry-run"
    )[2]
    # means of 4 x 8 x 8 x 8 bits, 7 directions among them, 3 weighted Gaussians over these for each of 10 labels
    assert f"which has {2048 * 8 + 30 * (1 + 7 + 28):,} numbers of its mixture beside them" in err
    assert "mixture" not in spikegen("train", "digits", "--dry-run")[2]


def test_train_prints_the_run_and_nothing_else_on_stdout(spikegen, tmp_path: Path) -> None:
    code, out, err = spikegen("train", "digits", *tiny_flags(), "--out", tmp_path / "run", "--device", "cpu")
    assert (code, out, err) == (0, f"{tmp_path / 'run'}\n", "")


def test_sample_is_a_function_of_run_seed_and_index(spikegen, run: Path, tmp_path: Path) -> None:
    for name, num in (("a", 3), ("b", 70)):
        code, out, _ = spikegen("sample", run, "--num", num, "--seed", 5, "--images", tmp_path / name)
        assert (code, out) == (0, f"{tmp_path / name}\n")
    files = [sorted((tmp_path / name).iterdir()) for name in ("a", "b")]
    assert [f.name for f in files[1]] == [f"{k:06d}.png" for k in range(70)]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(files[0], files[1], strict=False))
    other = tmp_path / "c"
    spikegen("sample", run, "--num", 3, "--seed", 6, "--images", other)
    assert any((other / f.name).read_bytes() != f.read_bytes() for f in files[0])


def test_sample_writes_a_grid_by_default_into_the_run(spikegen, run: Path) -> None:
    code, out, _ = spikegen("sample", run, "--num", 4, "--label", 3)
    assert (code, out) == (0, f"{run / 'samples.png'}\n")
    with Image.open(run / "samples.png") as grid:
        assert grid.size == (38, 38)


def test_reconstruct_reports_the_error_of_what_it_drew(spikegen, run: Path) -> None:
    code, out, _ = spikegen("reconstruct", run, "--num", 8)
    assert code == 0
    assert (run / "reconstructions.png").is_file()
    assert re.search(r"mean squared error .*: 0\.\d{4}", out)


def test_a_saved_model_folder_samples_too(spikegen, run: Path, tmp_path: Path) -> None:
    code, _, _ = spikegen("sample", run / "model", "--num", 2, "--out", tmp_path / "g.png")
    assert code == 0
    code, _, err = spikegen("reconstruct", run / "model", "--out", tmp_path / "r.png")
    assert code == 2
    assert "config.yaml" in err


def test_profile_counts_parameters_operations_and_energy(spikegen, run: Path) -> None:
    code, out, _ = spikegen("profile", run)
    assert code == 0
    assert all(word in out for word in ("parameters:", "MACs", "ACs", "microjoules", "sampling:", "engine: numba"))


def test_export_writes_a_program_and_says_what_it_takes(spikegen, run: Path, tmp_path: Path) -> None:
    code, out, _ = spikegen("export", run, "--format", "torch", "--out", tmp_path / "a.pt2")
    assert code == 0
    assert out.splitlines()[0].startswith("noise [2, B, 8] in [0, 1), label [B] in 0..9 -> images [B, 1, 8, 8]")
    assert out.splitlines()[1] == str(tmp_path / "a.pt2")
    made = torch.export.load(tmp_path / "a.pt2").module()(torch.rand(2, 3, 8), torch.tensor([0, 5, 9]))
    assert made.shape == (3, 1, 8, 8)


# ---- what a user can get wrong: one line, exit code 2, nothing harmed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "No such command"),
        (["train", "mnsit"], "did you mean mnist?"),
        (["train", "digits", "--set", "training.epcohs=1"], "did you mean epochs?"),
        (["train", "digits", "--set", "model.attention.kind=tcj"], "did you mean tcja?"),
        (["train", "digits", "--set", "training.batch_size=0"], "training.batch_size"),
        (["train", "digits", "--set", "training.epochs=true"], "training: epochs is True; it must be a number"),
        (["train", "digits", "--set", "model.stages=[{{channels: 8, stride: true}}]"], "stride is True; it must be"),
        (["train", "cifar10", "--set", "scoring.extractor=cnn", "--dry-run"], "no classifier for cifar10"),
        (["train", "digits", "--set", "training.betas=[yes, 0.9]"], "training: betas is [True, 0.9]; it must be"),
        (["train", "digits", "--set", "scoring.extractor=foo"], "extractor 'foo'"),
        (["train", "digits", "--set", "scoring.extractor=cnn:mnist"], "the real images are digits's"),
        (["train", "digits", "--set", "scoring.extractor=foo", "--dry-run"], "extractor 'foo'"),
        (
            ["train", "digits", "--set", "model.num_steps=1", "--set", "training.batch_size=1", "--dry-run"],
            "2 a process",
        ),
        (["train", "digits", "--set", "data.image_size=17", "--dry-run"], "multiple of 4"),
        (["train", "digits", "--resume", "--out", "none"], "none is no run"),
        (["train", "mnist", "--set", "data.download=false"], "data.root"),
        (["train", "digits", "--device", "tpu"], "--device"),
        (["train", "digits", "--out", "{file}/run"], "cannot write"),
        (["train", "digits", "--set", "model.conditional=true", "--set", "data={{name: celeba}}"], "class labels"),
        (["score", "{run}", "--out", "{run}"], "ends in .json"),
        (["score", "{run}", "--out", "{run}/config.yaml"], "ends in .json"),
        (["score", "{run}", "--out", "{file}/scores.json"], "cannot write"),
        (["score", "{run}", "--num", "1"], "--num"),
        (["sample", "nowhere", "--images", "new"], "nowhere is no run folder"),
        (["sample", "nowhere"], "nowhere is no run folder"),
        (["sample", "{run}", "--num", "0"], "--num"),
        (["sample", "{run}", "--num", "x"], "--num"),
        (["sample", "{run}", "--seed", "-1"], "--seed"),
        (["sample", "{run}", "--label", "10"], "label 10 is out of range: 0 to 9"),
        (["sample", "{run}", "--label", "-1"], "label -1 is out of range"),
        (["sample", "{run}", "--out", "grid.xyz"], "ends in .png"),
        (["sample", "{run}", "--out", "{file}/grid.png"], "cannot write"),
        (["sample", "{run}", "--images", "{run}"], "not empty"),
        (["reconstruct", "{run}", "--num", "0"], "--num"),
        (["profile", "{file}"], "file is a file; a run or a saved model is a folder"),
        (["profile", "{run}/.."], "is no run and no saved model"),
        (["sample", "{run}/samples", "--out", "x.png"], "is no run and no saved model (a run has config.yaml, a saved"),
        (["export", "{run}", "--format", "nir", "--out", "a.nir"], "NIR cannot express encoder.0.attention"),
        (["export", "{run}", "--format", "nir", "--out", "{run}/config.yaml"], "ends in .nir"),
        (["export", "{run}", "--format", "torch", "--out", "{file}/a.pt2"], "cannot write"),
        (["export", "{run}", "--format", "pdf", "--out", "a.pdf"], "--format"),
        (["export", "{run}", "--format", "nir"], "--out"),
        (["export", "{file}", "--format", "onnx", "--out", "a.onnx"], "file is a file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    spikegen, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    code, out, err = spikegen(*(a.format(run=run, file=tmp_path / "file") for a in arguments))
    assert (code, out) == (2, "")
    assert line in err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert before == {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file"]


def test_a_model_beside_a_lost_config_is_pointed_to(spikegen, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    code, _, err = spikegen("sample", tmp_path / "run", "--out", tmp_path / "x.png")
    assert (code, f"did you mean {tmp_path / 'run' / 'model'}?" in err) == (2, True)


def test_a_data_folder_that_is_a_file_is_named(spikegen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").write_text("")
    monkeypatch.setenv("SPIKEGEN_DATA", str(tmp_path / "data"))
    code, _, err = spikegen("train", "mnist", "--out", tmp_path / "run", "--device", "cpu")
    assert (code, f"{tmp_path / 'data'} is a file" in err, err.count("\n")) == (2, True, 1)


@pytest.mark.parametrize("line", ["[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:1", "x"])
def test_a_process_that_others_left_says_so_and_no_bug(spikegen, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    def left(*_: object, **__: object) -> None:
        raise RuntimeError(line)

    monkeypatch.setattr("spikegen.training.train", left)
    for processes, code in ("2", 1), ("1", 1):
        monkeypatch.setenv("WORLD_SIZE", processes)
        found, _, err = spikegen("train", "digits")
        gone = "gloo" in line and processes == "2"
        assert (found, "another process of this training" in err) == (code, gone)
        assert ("bug in spikegen" in err) is not gone


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
@pytest.mark.parametrize("verb", ["sample", "reconstruct", "profile", "train", "score"])
def test_cuda_where_there_is_none(spikegen, run: Path, tmp_path: Path, verb: str) -> None:
    name = "x.json" if verb == "score" else "x.png"
    out = ["--out", str(tmp_path / name)] if verb != "profile" else []
    code, _, err = spikegen(verb, "digits" if verb == "train" else run, "--device", "cuda", *out)
    assert code == 2
    assert "no CUDA device" in err


@pytest.mark.parametrize("inside", ["", "config.yaml"])
def test_a_run_is_resumed_by_its_folder_and_gets_back_a_model_that_was_lost(
    spikegen, tmp_path: Path, inside: str
) -> None:
    run = train(tiny_config(training__epochs=0.2), tmp_path / "run", device="cpu")
    weights, rows = run / "model" / "model.safetensors", Run(run).rows()
    before = weights.read_bytes()
    shutil.rmtree(run / "model")
    code, _, err = spikegen("sample", run, "--num", 2, "--out", tmp_path / "x.png")
    assert (code, "go on with: spikegen train " in err) == (2, True)
    assert spikegen("train", run / inside, "--device", "cpu", "--resume")[0] == 0
    assert weights.read_bytes() == before
    assert Run(run).rows() == rows


def test_resuming_by_the_preset_keeps_how_the_run_is_scored(spikegen, tmp_path: Path) -> None:
    run = train(tiny_config(training__epochs=0.2, scoring__num=77), tmp_path / "run", device="cpu")
    told = [f for f in tiny_flags() if not f.startswith("scoring")]
    told = [f for k, f in enumerate(told) if f != "--set" or (k + 1 < len(told) and told[k + 1] != "--set")]
    flags = [*told, "--set", "training.epochs=0.2", "--device", "cpu", "--out", run, "--resume"]
    assert spikegen("train", "digits", *flags)[0] == 0
    assert Run(run).config().scoring.num == 77
    assert spikegen("train", "digits", *flags, "--set", "scoring.num=78")[0] == 0
    assert Run(run).config().scoring.num == 78


def test_an_existing_run_without_resume(spikegen, run: Path) -> None:
    code, _, err = spikegen("train", "digits", *tiny_flags(), "--out", run)
    assert code == 2
    assert "--resume" in err


@pytest.mark.parametrize(
    ("file", "damage", "line"),
    [
        ("model/model.safetensors", lambda b: b[:500], "truncated"),
        ("model/model.safetensors", lambda b: b"", "truncated"),
        ("model/config.json", lambda b: b[:-20], "not JSON"),
        ("model/config.json", lambda b: b"[]", "config.json"),
        ("model/config.json", lambda b: b'{"model": 3}', "config.json"),
        (
            "model/config.json",
            lambda b: b.replace(b'"image_shape"', b'"extra": 1, "image_shape"'),
            "extra is not a key",
        ),
        ("model/config.json", lambda b: b.replace(b'"size": 8', b'"size": 9'), "does not fit"),
        ("config.yaml", lambda b: b.replace(b"num_steps: 2", b"num_steps: 3"), "num_steps 3, but"),
        ("config.yaml", lambda b: b"model: [", "not YAML"),
    ],
)
def test_a_damaged_run_is_named(spikegen, tmp_path: Path, run: Path, file: str, damage, line: str) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    (broken / file).write_bytes(damage((run / file).read_bytes()))
    code, _, err = spikegen("sample", broken)
    assert code == 2
    assert line in err
    assert err.count("\n") == 1


def test_a_foreign_safetensors_is_refused(spikegen, tmp_path: Path, run: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(run, tmp_path / "other")
    save_file({"w": torch.zeros(3)}, tmp_path / "other" / "model" / "model.safetensors")
    code, _, err = spikegen("sample", tmp_path / "other")
    assert code == 2
    assert "does not fit" in err


# ---- signals and disks


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_with_130(tmp_path: Path, signum: signal.Signals) -> None:
    flags = [
        *tiny_flags(),
        "--set",
        "training.epochs=10000",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
    ]
    with subprocess.Popen(command("train", "digits", *flags), stderr=subprocess.PIPE, text=True) as process:
        deadline = time.time() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.time() < deadline:
            time.sleep(0.1)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in err
    state = Run(tmp_path / "run").load_checkpoint(torch.device("cpu"))
    rows = Run(tmp_path / "run").rows()
    assert state["images_seen"] >= max(row["images_seen"] for row in rows)


@pytest.mark.slow
def test_a_disk_that_fills_while_saving_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*tiny_flags(), "--device", "cpu", "--out", str(run)]
    code = (
        "import spikegen.phases as t\nreal = t.loss_parts\ncalls = []\n"
        "def f(*a):\n calls.append(0)\n import os, signal\n"
        " if len(calls) == 3: os.kill(os.getpid(), signal.SIGTERM)\n return real(*a)\n"
        "t.loss_parts = f\nfrom spikegen.cli import entry\nentry()"
    )
    stopped = subprocess.run([sys.executable, "-c", code, "train", "digits", *flags], capture_output=True, check=False)
    assert stopped.returncode == 130
    before = {f.name: f.read_bytes() for f in (run / "checkpoints").iterdir()}
    limit = len(next(iter(before.values()))) // 2
    full = subprocess.run(
        command("train", "digits", *flags, "--resume"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("Error: cannot save")
    assert {f.name: f.read_bytes() for f in (run / "checkpoints").iterdir()} == before
    assert not list(run.rglob("*.part"))
    again = subprocess.run(command("train", "digits", *flags, "--resume"), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr


def test_a_disk_that_fills_leaves_the_saved_model(run: Path, tmp_path: Path) -> None:
    model = SpikingVAE.from_pretrained(run / "model")
    model.save(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="cannot save"):
            model.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_two_processes_train_one_run_and_resume_it(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]

    def run(*more: str) -> dict[str, torch.Tensor]:
        done = subprocess.run(
            [*launch, *command("train", "digits", *tiny_flags(), "--device", "cpu", "--out", tmp_path / "run", *more)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        state = Run(tmp_path / "run").load_checkpoint(torch.device("cpu"))
        assert state["images_seen"] == 208
        model: dict[str, torch.Tensor] = state["model"]
        return model

    whole = run()
    *_, before, last = sorted((tmp_path / "run" / "checkpoints").iterdir())
    last.unlink()
    assert before.exists()
    assert all(torch.equal(v, whole[k]) for k, v in run("--resume").items())
