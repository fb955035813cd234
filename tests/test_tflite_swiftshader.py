"""SwiftShader: set up whole, or not at all."""

import os
import shutil

import pytest

from keras_sparse.tflite.commands import RuntimeMissing
from keras_sparse.tflite.swiftshader import setup_gpu


def program(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_set_up_from_a_package(tmp_path, monkeypatch):
    """With stand-ins for Debian's tools: a package of 80 MB is not downloaded for a test."""
    tools = tmp_path / "tools"
    tools.mkdir()
    system = os.path.dirname(shutil.which("touch"))
    monkeypatch.setenv("KERAS_SPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(RuntimeMissing, match="`apt-get` is not on the PATH"):
        setup_gpu()
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{system}")
    program(tools / "apt-get", "touch chromium.deb")
    program(tools / "dpkg", "mkdir -p package/usr/lib/chromium")
    with pytest.raises(RuntimeMissing, match="holds no libvk_swiftshader.so"):
        setup_gpu()
    files = "libvk_swiftshader.so vk_swiftshader_icd.json libvulkan.so.1"
    program(tools / "dpkg", f"mkdir -p package/usr/lib/chromium; cd package/usr/lib/chromium; touch {files} chromium")
    folder = setup_gpu()
    assert folder == tmp_path / "cache" / "swiftshader" and sorted(os.listdir(folder)) == sorted(files.split())
    program(tools / "apt-get", "echo no network >&2; exit 7")
    with pytest.raises(RuntimeMissing, match=r"apt-get update.*exit status 7 \(no network\)"):
        setup_gpu()
    assert sorted(os.listdir(folder)) == sorted(files.split()) and os.listdir(folder.parent) == ["swiftshader"]
