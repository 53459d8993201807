"""Ending a process of a test with everything that it started."""

import subprocess
from contextlib import suppress
from typing import Any

import psutil


def kill_family(process: subprocess.Popen[Any], timeout_s: float = 60) -> None:
    """SIGKILL a child of ours first, then all its descendants, and wait until they are gone.

    The first goes before what it started, so that it cannot start more; what ended by itself meanwhile is as wanted.
    """
    family: list[psutil.Process] = []
    with suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for each in family:
        with suppress(psutil.Error):
            each.kill()
    process.wait(timeout=timeout_s)
    psutil.wait_procs(family, timeout=timeout_s)
