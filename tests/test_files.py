"""Files are whole or not there; what is wrong with one is said."""

import os

import numpy as np
import pytest

from keras_sparse import files


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        with open(temporary, "w") as file:
            file.write("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("name", "error"), [("a.bin", ValueError), ("folder.txt", IsADirectoryError), ("no/a.txt", FileNotFoundError)]
)
def test_where_nothing_can_be_written(tmp_path, name, error):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(error), files.replacing(tmp_path / name, ".txt"):
        pass
    assert os.listdir(tmp_path) == ["folder.txt"]


def test_arrays(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.arange(3), y=np.ones(3))
    x, y = files.load_arrays(path)
    assert (x.tolist(), y.tolist()) == ([0, 1, 2], [1, 1, 1])
    with pytest.raises(ValueError, match="arrays: `z`.*KeyError"):
        files.load_arrays(path, "`z`", lambda file: file["z"])
    np.save(path.with_suffix(".npy"), np.ones(3))
    with pytest.raises(ValueError, match=r"Expected an .npz file.*a.npy.*it is an .npy file, with one array"):
        files.load_arrays(path.with_suffix(".npy"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="Expected an .npz file"):
        files.load_arrays(path)


def test_inputs_by_name_stand_beside_targets(tmp_path):
    np.savez(tmp_path / "named.npz", words=np.ones((3, 2)), age=np.arange(3), y=np.zeros(3))
    inputs, targets = files.load_arrays(str(tmp_path / "named.npz"))
    assert inputs["age"].tolist() == [0, 1, 2] and set(inputs) == {"words", "age"}
    assert targets.tolist() == [0, 0, 0]
    assert set(files.load_arrays(str(tmp_path / "named.npz"), "inputs", files.inputs)) == {"words", "age"}
