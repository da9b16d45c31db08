"""The heap keeps what is freed, where the C library is glibc."""

import platform
import sys

import pytest

from spikegen import memory


@pytest.fixture(autouse=True)
def _anew():
    memory.keep_freed_memory.cache_clear()
    yield
    memory.keep_freed_memory.cache_clear()


def test_glibc_is_told():
    assert memory.keep_freed_memory() is (platform.libc_ver()[0] == "glibc")


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.keep_freed_memory() is False


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError("musl")))
    assert memory.keep_freed_memory() is False
