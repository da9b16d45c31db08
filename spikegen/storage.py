"""Writing to disk so that nothing already there is lost: beside, flushed, then renamed."""

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from spikegen.spec import UserError


@contextlib.contextmanager
def replacing(path: Path, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is flushed and renamed over `path`.

    `flush` False leaves the flushing to the system, for many small files. When the block fails the temporary is
    removed and `path` is as it was. Raises UserError when the folder cannot be written, OSError when the disk fills.
    """
    with user_mistakes("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with user_mistakes("write", path):
            yield beside
            if flush:
                with open(beside, "rb+") as f:
                    os.fsync(f.fileno())
            os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        code = getattr(error, "errno", None) or errno.EIO
        raise OSError(code, f"cannot save {path}: {why}; what was there before is unharmed") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def user_mistakes(verb: str, path: Path) -> Iterator[None]:
    """Turn the errors of a path that a user chose badly into a UserError; a full disk stays an OSError."""
    try:
        yield
    except (
        PermissionError,
        FileExistsError,
        FileNotFoundError,
        NotADirectoryError,
        IsADirectoryError,
    ) as error:
        raise UserError(f"cannot {verb} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot {verb} {path}: it is no text file (UTF-8)") from None
    except OSError as error:
        if error.errno in (errno.EROFS, errno.ENAMETOOLONG):
            raise UserError(f"cannot {verb} {path}: {error.strerror}") from None
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, beside and renamed."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, beside and renamed."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def keep_aside(path: Path) -> None:
    """Rename what is at `path`, if anything: NAME.json becomes NAME-1.json, or what number is free."""
    if path.exists():
        names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


def read_json(path: Path) -> Any:
    """The JSON in `path`; UserError when it is absent or broken."""
    with user_mistakes("read", path):
        text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def require_writable(path: Path) -> None:
    """UserError now, before hours of work, when a file or folder at `path` could not be written later."""
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is no ordinary file")
    folder = path
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() and folder != path:
        raise UserError(f"cannot write {path}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}: {folder} is not writable")


def require_file(path: Path, suffix: str) -> None:
    """As `require_writable`, and UserError for a name that does not end in `suffix`: no other kind of file is lost."""
    if path.suffix.lower() != suffix:
        raise UserError(f"cannot write {path}: the name of such a file ends in {suffix}")
    require_writable(path)
