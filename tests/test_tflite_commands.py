"""Runtimes as objects: what is missing is named, and nobody asks for a name to know what one can do."""

import ast
import pathlib
import platform
import sys

import pytest

import keras_sparse
from keras_sparse.tflite.commands import MEASURING, RUNTIMES, RuntimeMissing, available, cache_folder, get


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
    assert list(missing) == list(RUNTIMES)
    assert missing["native"] is None
    assert "Node.js" in missing["wasm"]
    assert "setup-arm64" in missing["arm64"] and str(bare / "cache" / "arm64") in missing["arm64"]
    executable(bare / "node")
    assert f"npm install --legacy-peer-deps --prefix {bare / 'cache'} @litertjs/core@" in available()["wasm"]
    (bare / "cache" / "arm64").mkdir(parents=True)
    (bare / "cache" / "arm64" / "instructions.so").touch()
    assert "no Python for ARM64" in available()["arm64"]
    with pytest.raises(RuntimeMissing, match="setup-arm64"):
        get("arm64").start(bare)


@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="for Linux on x86_64")
def test_without_qemu(bare):
    assert "apt-get install qemu-user" in available()["x86-no-avx"]
    qemu = executable(bare / "qemu-x86_64")
    line, environment = get("x86-no-avx").start(bare)
    assert line[:3] == [str(qemu), "-cpu", "Nehalem"] and environment["OPENBLAS_CORETYPE"] == "Nehalem"


@pytest.mark.parametrize("where", ["project", "project/deeper", "cache"])
def test_litertjs_is_found_where_node_looks_for_it(where, bare, monkeypatch):
    executable(bare / "node")
    (bare / "project" / "deeper").mkdir(parents=True)
    package = bare / ("cache" if where == "cache" else "project") / "node_modules" / "@litertjs" / "core"
    package.mkdir(parents=True)
    (package / "package.json").write_text("{}")
    monkeypatch.chdir(bare / where if where != "cache" else bare)
    line, _ = get("wasm").start(bare)
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


@pytest.mark.parametrize("name", ["phone", None, 1, ["native"]])
@pytest.mark.parametrize("among", [None, MEASURING])
def test_unknown_runtimes(name, among):
    names = ", ".join(map(repr, RUNTIMES if among is None else among))
    with pytest.raises(ValueError) as error:
        get(name, among)
    assert str(error.value) == f"`runtime` must be one of {names}. Received: runtime={name!r}"
    with pytest.raises(ValueError, match=r"Received: runtime='WASM'. Did you mean 'wasm'\?$"):
        get("WASM", among)


def test_what_is_derived_from_the_runtimes():
    assert all(name == runtime.name and runtime.title for name, runtime in RUNTIMES.items())
    assert [name for name in MEASURING if not name.startswith("gpu")] == ["native", "wasm", "arm64", "compiled-cpu"]
    # Where sparse kernels are off, a comparison cannot see their faults.
    assert all(runtime.sparse_convolutions for runtime in RUNTIMES.values() if runtime.verifies)


def test_nobody_compares_a_name():
    """To add a runtime is to add an object and its worker: what others ask of one is an attribute."""
    found = []
    for path in pathlib.Path(keras_sparse.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Compare, ast.MatchValue)):
                constants = {
                    n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                }
                found += [(path.name, node.lineno) for name in constants & set(RUNTIMES)]
    assert found == []
