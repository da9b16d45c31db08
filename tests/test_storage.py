import errno
import json
from pathlib import Path

import pytest

from spikegen import UserError
from spikegen.storage import read_json, replacing, require_writable, write_json, write_text


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"x": [1, 2.5, None]})
    assert read_json(tmp_path / "a" / "b.json") == {"x": [1, 2.5, None]}
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["b.json"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "f"
    write_text(path, "old")

    def fail() -> None:
        with replacing(path) as beside:
            beside.write_text("half of the ne")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_under_a_file_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "file" / "x", "text")
    with pytest.raises(UserError, match="cannot write"):
        require_writable(tmp_path / "file" / "x" / "y")
    with pytest.raises(UserError, match=r"file is a file, not a folder"):
        require_writable(tmp_path / "file" / "x")
    require_writable(tmp_path / "new" / "deep" / "x")
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_too_long_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / ("x" * 300), "text")


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(UserError, match=r"x\.json: not JSON"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"cannot read .*y\.json"):
        read_json(tmp_path / "y.json")
