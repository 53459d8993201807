"""Working folders end with their process, however that ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from audiomae import scratch as module
from audiomae.errors import UserError
from audiomae.scratch import scratch, scratch_dir

HOLD = """
import sys
from audiomae.scratch import scratch_dir
folder = scratch_dir("held")
(folder / "data").write_bytes(bytes(1000))
print(folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def tmpdir_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def process() -> tuple["subprocess.Popen[str]", Path]:
    child = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return child, Path(child.stdout.readline().strip())


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for root in tmp_path.iterdir() for path in root.iterdir())


def test_a_folder_goes_with_its_block_and_is_the_users_alone(tmp_path: Path) -> None:
    with scratch("work") as folder:
        assert folder.is_dir() and folder.name.startswith("work-") and not list(folder.iterdir())
        assert folder.parent.stat().st_mode & 0o077 == 0
        (folder / "file").write_text("x")
    assert left(tmp_path) == []


def test_what_a_killed_process_left_goes_when_the_next_folder_is_made_and_a_living_ones_stays(tmp_path: Path) -> None:
    killed, abandoned = process()
    living, held = process()
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    assert (abandoned / "data").exists()
    with scratch("next"):
        assert not abandoned.exists() and (held / "data").exists()
    living.communicate("", timeout=60)  # it ends by itself, and takes its folder along
    assert left(tmp_path) == []


def test_folders_of_one_process_do_not_take_each_other_for_abandoned(tmp_path: Path) -> None:
    with scratch("a") as first, scratch("b") as second:
        assert first.is_dir() and second.is_dir()
        assert scratch_dir("c").is_dir() and first.is_dir()


def test_a_folder_goes_with_its_owner(tmp_path: Path) -> None:
    class Owner:
        pass

    owner = Owner()
    assert scratch_dir("owned", owner).is_dir()
    del owner
    assert left(tmp_path) == []


def test_a_folder_of_another_user_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with scratch("mine") as folder:
        owner = folder.parent.stat().st_uid
    monkeypatch.setattr(module.os, "getuid", lambda: owner + 1)
    (folder.parent.parent / f"audiomae-{owner + 1}").mkdir()
    with pytest.raises(UserError, match="TMPDIR"), scratch("theirs"):
        os._exit(1)
