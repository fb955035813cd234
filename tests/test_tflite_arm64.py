"""The ARM64 runtime: set up whole, or not at all."""

import os
import pathlib
import shutil

import pytest
from tflite_models import mlp

import keras_sparse as ks
from keras_sparse.tflite.arm64 import setup_arm64
from keras_sparse.tflite.commands import RuntimeMissing

RELEASE = pathlib.Path("/etc/os-release")
NEEDED = ("apt-get", "dpkg", "qemu-aarch64", "cc")
LACKING = [name for name in NEEDED if shutil.which(name) is None]
if not RELEASE.exists() or "ID=debian" not in RELEASE.read_text():
    LACKING.append("Debian")


@pytest.mark.slow
@pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}")
def test_set_up_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_SPARSE_CACHE", str(tmp_path / "cache"))
    folder = setup_arm64()
    assert folder == tmp_path / "cache" / "arm64" and os.listdir(folder.parent) == ["arm64"]
    compiled = set(folder.rglob("*.pyc"))  # once, and not at each start under the emulator
    ks.tflite.export(mlp(), tmp_path / "mlp.tflite", target="xnnpack")
    first, second = (ks.tflite.benchmark(tmp_path / "mlp.tflite", runtime="arm64").rows[0] for _ in range(2))
    assert compiled and compiled == set(folder.rglob("*.pyc"))
    assert first == second and 10_000 < first["instructions"] < 1_000_000


def test_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    folder = tmp_path / "arm64"
    folder.mkdir()
    (folder / "older").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeMissing, match="`no-such-compiler`.*apt-get install gcc"):
        setup_arm64(folder)
    for name in ("no-such-compiler", "dpkg", "apt-get"):
        (tmp_path / name).write_text("#!/bin/sh\necho no network >&2\nexit 7\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(RuntimeMissing, match=r"`apt-get update -q ...` ended with exit status 7 \(no network\)"):
        setup_arm64(folder)
    assert os.listdir(folder) == ["older"]
    assert sorted(os.listdir(tmp_path)) == ["apt-get", "arm64", "dpkg", "no-such-compiler"]
