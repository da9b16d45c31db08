"""What numba compiles is kept, and found again if nothing that it is made of has changed."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from spikegen.kernels import numba_tools  # noqa: E402


def test_what_other_helpers_were_inlined_into_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def compile_one() -> None:
        def nothing(begin, end, context):  # type: ignore[no-untyped-def]
            pass

        numba_tools.compiled(nothing)

    kept: list[set[Path]] = []
    for version in ("one", "one", "two"):
        monkeypatch.setattr(numba_tools, "_VERSION", version)
        compile_one()
        kept.append(set(tmp_path.rglob("*.nbc")))
    assert [len(files) for files in kept] == [1, 1, 2]


def test_each_file_that_passes_are_made_of_is_looked_at() -> None:
    """What a pass takes from another file, a helper or a constant, is compiled into it."""
    folder = Path(numba_tools.__file__).parent
    helper = type(numba_tools.pointer), type(numba_tools.prefetch)
    taken = set()
    for file in folder.glob("*_numba.py"):
        module = importlib.import_module(f"spikegen.kernels.{file.stem}")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spikegen.kernels."):
                values = [(alias.name, vars(module)[alias.asname or alias.name]) for alias in node.names]
                if any(name.isupper() or isinstance(x, helper) for name, x in values):
                    taken.add(f"{str(node.module).rsplit('.', 1)[1]}.py")
    assert taken == set(numba_tools._INLINED)


def test_the_largest_float_is_the_largest_integer() -> None:
    """Of both signs, zeros and infinities."""
    numbers = [-float("inf"), -3.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, float("inf")]
    key: Any = numba.njit(lambda x: numba_tools.ordered(x))
    for float_, integer in ((np.float32, np.int32), (np.float64, np.int64)):
        keys = [key(float_(x)) for x in numbers]
        assert keys == sorted(keys)
        assert len(set(keys)) == len(numbers)
        assert [key(integer(k)) for k in keys] == [float_(x) for x in numbers]


@pytest.mark.slow
def test_what_is_compiled_is_kept_for_the_next_process(tmp_path: Path) -> None:
    code = (
        "import torch; from spikegen.kernels import attending as a, multi_gates as m;"
        "y = torch.rand(2, 3, 4, 4, 5).movedim(-1, 2).requires_grad_();"
        "g = m.Gates(None, None, torch.rand(1, 2, 3, 3), True);"
        "x = m.gate(y, a.squeeze(y, torch.ones(5)), 2, None, g); (x.gate.sum() + x.y.sum()).backward()"
    )
    kept = []
    for _ in range(2):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        kept.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")})
    functions = [path.name.split("-")[0] for path in kept[0]]
    modules = {name.split(".")[0] for name in functions}
    assert modules == {"conv_numba", "excitation_numba", "squeeze_channels_numba", "squeeze_numba"}
    assert len(set(functions)) == len(functions)  # each compiled once
    assert kept[0] == kept[1]
