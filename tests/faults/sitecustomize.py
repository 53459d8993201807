"""Put this folder on PYTHONPATH and the decoder of every process breaks on files with telling names.

`segfault*`, `killed*`, `exits*` take the process down, `hangs*` never returns; AUDIOMAE_FAULT_DELAY_S makes each file
take that long. Product code knows nothing of it: the decoder is replaced when its module is first imported.
"""

import ctypes
import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

TARGET = "audiomae.corpus.decode"


def break_decoder(module: Any) -> None:
    """Replace `iter_windows` of the decode module."""
    original = module.iter_windows

    def iter_windows(source: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        name = os.path.basename(str(source))
        time.sleep(float(os.environ.get("AUDIOMAE_FAULT_DELAY_S", "0")))
        if name.startswith("segfault"):
            ctypes.string_at(0)
        if name.startswith("killed"):  # as the kernel does when memory runs out
            os.kill(os.getpid(), signal.SIGKILL)
        if name.startswith("hangs"):
            signal.pause()
        if name.startswith("bomb"):
            bytearray(1 << 45)
        for number, window in enumerate(original(source, *args, **kwargs)):
            yield window
            if name.startswith("exits") and number == 1:
                os._exit(7)

    module.iter_windows = iter_windows


class Finder(importlib.abc.MetaPathFinder):
    """Finds the decode module as Python would, and breaks it once it is loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == TARGET else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            break_decoder(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())


def hide(folder: str) -> None:
    """Put an empty folder over `folder` for this process and its children: a node with a disk of its own.

    It does what `unshare --mount` and `mount -t tmpfs` do; without root in a user namespace of its own.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private, recursive = 0x00020000, 0x10000000, 1 << 18, 1 << 14
    if libc.unshare(new_mounts | (0 if os.geteuid() == 0 else new_user)):
        raise OSError(ctypes.get_errno(), "unshare")
    if libc.mount(b"none", b"/", None, recursive | private, None):
        raise OSError(ctypes.get_errno(), "mount")
    if libc.mount(b"none", folder.encode(), b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), f"mount {folder}")


if os.environ.get("AUDIOMAE_FAULT_HIDE"):
    hide(os.environ["AUDIOMAE_FAULT_HIDE"])
