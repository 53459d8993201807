"""Working folders on the local disk that end with their process, even when it is killed.

They lie below one folder of the user in TMPDIR. Beside each lies a file that its process keeps locked; the lock ends
with the process, and whoever makes the next folder removes those whose lock nobody holds.
"""

import atexit
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from audiomae.errors import UserError

LOCK = ".lock"


@contextmanager
def scratch(purpose: str) -> Iterator[Path]:
    """An empty folder for as long as the block runs; `purpose` is the first part of its name."""
    folder = _Folder(purpose)
    try:
        yield folder.path
    finally:
        folder.remove()


def scratch_dir(purpose: str, owner: Any = None) -> Path:
    """An empty folder for as long as `owner` lives, or else this process."""
    folder = _Folder(purpose)
    if owner is None:
        atexit.register(folder.remove)
    else:
        weakref.finalize(owner, folder.remove)
    return folder.path


class _Folder:
    def __init__(self, purpose: str) -> None:
        root = _root()
        for lock in root.glob(f"*{LOCK}"):
            _remove_abandoned(lock)
        while True:
            self._descriptor, name = tempfile.mkstemp(suffix=LOCK, prefix=f"{purpose}-", dir=root)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            if os.fstat(self._descriptor).st_nlink:
                break
            os.close(self._descriptor)  # another process took it for abandoned before it was locked
        self._lock = Path(name)
        self.path = self._lock.with_suffix("")
        self.path.mkdir()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.unlink(missing_ok=True)
        with suppress(OSError):  # removed before
            os.close(self._descriptor)


def _root() -> Path:
    root = Path(tempfile.gettempdir()) / f"audiomae-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise UserError(f"{root} belongs to another user: set TMPDIR to a folder of your own")
    return root


def _remove_abandoned(lock: Path) -> None:
    """Remove the folder of a process that is no more."""
    with suppress(FileNotFoundError), lock.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
        lock.unlink(missing_ok=True)
