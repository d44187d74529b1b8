"""Files of other users and systems: what may not be read is named as such and never taken for
missing or damaged, weights have the umask's mode, hidden files are no data.
"""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dpfast.errors import InputError, UnreadableError
from dpfast.files import below, check_readable, listed, reading, there
from dpfast.practice.checkpoint import Checkpoint, latest, save, save_weights
from tests.other_user import run_as_other_user


@pytest.fixture
def shared():
    """A folder that every user may enter, which pytest's are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def refused(monkeypatch):
    """Files that the system refuses to open and folders that it refuses to list, as it refuses
    another user: by path.
    """
    paths = set()

    def refusing(real):
        def call(path, *arguments, **options):
            if str(path) in paths:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *arguments, **options)

        return call

    monkeypatch.setattr(Path, "open", refusing(Path.open))
    monkeypatch.setattr(Path, "read_bytes", refusing(Path.read_bytes))
    monkeypatch.setattr("os.listdir", refusing(os.listdir))
    return paths


def checkpoints(folder, count=2):
    for step in range(count):
        taken = Checkpoint(step, 4, 1, {"learner": {"weights": torch.full((2,), float(step))}})
        save(folder, taken, keep=count)
    return folder


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_weights_have_the_mode_that_other_files_have(tmp_path, umask):
    before = os.umask(umask)
    try:
        checkpoints(tmp_path / "checkpoints")
        save_weights({"a": torch.zeros(2)}, tmp_path / "learner_dp.safetensors")
        (tmp_path / "recipe.json").write_text("{}")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in below(tmp_path)}
    assert len(modes) == 6
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_a_checkpoint_that_may_not_be_read_is_named_and_no_other_one_is_taken(tmp_path, refused):
    folder = checkpoints(tmp_path)
    assert latest(folder).step == 1
    for suffix in (".json", ".safetensors"):
        path = str(folder / f"checkpoint-000001{suffix}")
        refused.add(path)
        with pytest.raises(UnreadableError, match=f"{path}: cannot be read: Permission denied"):
            latest(folder)
        refused.clear()
    refused.add(str(folder))
    with pytest.raises(UnreadableError, match=f"{folder}: cannot be read: Permission denied"):
        latest(folder)  # the run would begin anew


def test_a_folder_that_may_not_be_listed_is_not_an_empty_one(tmp_path, refused):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "0.png").touch()
    assert [path.name for path in below(tmp_path)] == ["0.png"]
    assert listed(tmp_path / "nowhere") == []
    assert not there(tmp_path / "nowhere")
    refused.add(str(tmp_path / "inner"))
    with pytest.raises(UnreadableError, match="inner: cannot be read"):
        list(below(tmp_path))


def test_what_may_not_be_read_says_so_by_its_path(tmp_path):
    with (
        pytest.raises(UnreadableError, match=r"^data\.bin: cannot be read: no"),
        reading(Path("data.bin")),
    ):
        raise PermissionError(13, "no")
    with pytest.raises(FileNotFoundError):
        check_readable(tmp_path / "nowhere")
    assert issubclass(UnreadableError, InputError)


def test_another_user_is_told_what_he_may_not_read(shared):
    """Where safetensors says "No such file" and ``Path.glob`` finds nothing."""
    closed = checkpoints(shared / "closed")
    weights = checkpoints(shared / "weights")
    for path in listed(weights, "*.safetensors"):
        path.chmod(0o600)
    closed.chmod(0o700)
    save_file({"a": torch.zeros(2)}, shared / "a.safetensors")
    os.chmod(shared / "a.safetensors", 0o600)
    (shared / "run").mkdir(mode=0o700)
    (shared / "run" / "recipe.json").write_text("{}")
    said = run_as_other_user(
        """
import sys
from pathlib import Path
from dpfast.files import check_readable, there
from dpfast.practice.checkpoint import latest
from dpfast.report.runs import read_run
shared = Path(sys.argv[1])
for call in (
    lambda: latest(shared / "closed"),
    lambda: latest(shared / "weights"),
    lambda: check_readable(shared / "a.safetensors"),
    lambda: read_run(shared / "run"),
    lambda: there(shared / "run" / "pool_dp"),
):
    try:
        print(call())
    except Exception as error:
        print(type(error).__name__, error)
""",
        str(shared),
    )
    assert said.stdout.split("\n")[:-1] == [
        f"UnreadableError {shared}/{name}: cannot be read: Permission denied"
        for name in (
            "closed",
            "weights/checkpoint-000001.safetensors",
            "a.safetensors",
            "run/recipe.json",
            "run/pool_dp",
        )
    ], said.stderr


def test_a_command_names_what_its_user_may_not_read(shared):
    (shared / "run").mkdir(mode=0o700)
    (shared / "recipe.toml").write_text("name = 'mine'")
    (shared / "recipe.toml").chmod(0o600)
    for arguments, place in (
        (["report", "run"], "run/recipe.json"),
        (["plan", "recipe.toml"], "recipe.toml"),
        (["export", "run", "--format", "parquet", "--out", "out"], "run/"),
        (["sample", "--labels", "0", "--pipeline", "run", "--out", "x"], "run"),
    ):
        said = run_as_other_user(
            "import sys, os; os.chdir(sys.argv[1]); from dpfast.cli.main import main\n"
            "sys.exit(main(sys.argv[2:]))",
            str(shared),
            *arguments,
        )
        assert said.returncode == 2, said.stderr
        line = said.stderr.strip().split("\n")[-1]
        assert line.startswith("dpfast: error: ")
        assert line.endswith("Permission denied")
        assert place in line, said.stderr
