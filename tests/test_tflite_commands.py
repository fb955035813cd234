"""Commands: what is missing is named, with what to install."""

import platform
import sys

import pytest

from keras_sparse.tflite.commands import RUNTIMES, RuntimeMissing, available, cache_folder, command


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine on which nothing is installed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KERAS_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def executable(path):
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="QEMU's user mode emulation exists on Linux only")
def test_what_to_install(bare):
    missing = available()
    assert tuple(missing) == RUNTIMES
    assert missing["native"] is None
    assert "Node.js" in missing["wasm"]
    assert "setup-arm64" in missing["arm64"] and str(bare / "cache" / "arm64") in missing["arm64"]
    executable(bare / "node")
    assert f"npm install --legacy-peer-deps --prefix {bare / 'cache'} @litertjs/core@" in available()["wasm"]
    (bare / "cache" / "arm64").mkdir(parents=True)
    (bare / "cache" / "arm64" / "instructions.so").touch()
    assert "no Python for ARM64" in available()["arm64"]
    with pytest.raises(RuntimeMissing, match="setup-arm64"):
        command("arm64")


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="for Linux on x86_64")
def test_without_qemu(bare):
    assert "apt-get install qemu-user" in available()["x86-no-avx"]
    qemu = executable(bare / "qemu-x86_64")
    line, environment = command("x86-no-avx")
    assert line[:3] == [str(qemu), "-cpu", "Nehalem"] and environment["OPENBLAS_CORETYPE"] == "Nehalem"


@pytest.mark.parametrize("where", ["project", "project/deeper", "cache"])
def test_litertjs_is_found_where_node_looks_for_it(where, bare, monkeypatch):
    executable(bare / "node")
    (bare / "project" / "deeper").mkdir(parents=True)
    package = bare / ("cache" if where == "cache" else "project") / "node_modules" / "@litertjs" / "core"
    package.mkdir(parents=True)
    (package / "package.json").write_text("{}")
    monkeypatch.chdir(bare / where if where != "cache" else bare)
    line, _ = command("wasm", bare)
    assert line[-2:] == [str(package), str(bare)]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"KERAS_SPARSE_CACHE": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/keras_sparse"),
        ({"HOME": "/home/me"}, "/home/me/.cache/keras_sparse"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="paths of POSIX")
def test_cache_folder(variables, expected, monkeypatch):
    for name in ("KERAS_SPARSE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == expected
