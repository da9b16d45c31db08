import re
from pathlib import Path

import pytest

from spikegen import cli
from spikegen.config import presets

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore::spikegen.requirements.ScoreWarning")  # 360 test images are few
def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert tuple(names["images"].shape) == (16, 1, 16, 16)  # type: ignore[attr-defined]
    assert "fid" in capsys.readouterr().out


def test_the_commands_and_presets_named_exist() -> None:
    verbs = set(re.findall(r"^    spikegen (\w+)", README, re.MULTILINE))
    assert verbs == set(cli.COMMANDS)
    trained = set(re.findall(r"spikegen train (\w+)(?![\w/])", README))  # not a path
    assert trained <= set(presets())


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_every_link_leads_somewhere(page: str) -> None:
    file = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text())
    assert all((file.parent / link).exists() for link in links), links
