"""A folder made of packages is there whole, or as it was before."""

import os

import pytest

from keras_sparse.tflite.commands import RuntimeMissing
from keras_sparse.tflite.debian import call, prepared


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins for Debian's tools, on any system."""
    for name in ("apt-get", "dpkg"):
        (tmp_path / "tools" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tools" / name).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / "tools" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("KERAS_SPARSE_CACHE", str(tmp_path / "cache"))


def test_in_its_place_whole_or_not_at_all(tools, tmp_path):
    with prepared("tool") as (target, made, aside):
        assert target == tmp_path / "cache" / "tool" and not target.exists()
        (made / "first").touch()
        (aside / "archive").touch()
    with pytest.raises(RuntimeMissing), prepared("tool") as (_, made, aside):
        (made / "second").touch()
        raise RuntimeMissing("no network")
    assert os.listdir(target) == ["first"] and os.listdir(target.parent) == ["tool"]
    with prepared("tool", tmp_path / "elsewhere") as (_, made, _):
        (made / "third").touch()
    assert os.listdir(tmp_path / "elsewhere") == ["third"]


def test_what_fails_is_said(tmp_path):
    call(["sh", "-c", "touch here"], "Never.", cwd=tmp_path)
    assert (tmp_path / "here").exists()
    with pytest.raises(
        RuntimeMissing, match=r"^No tool. Received: `sh -c .* ...` ended with exit status 7 \(no network\)"
    ):
        call(["sh", "-c", "echo no network >&2; exit 7"], "No tool.")
