"""Connecting to Ray the same way in every job."""

import atexit
import importlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from audiomae.cli import waiting
from audiomae.errors import UserError

if TYPE_CHECKING:
    from ray.data import DataContext

ENCODER = "audiomae.model.encoder"  # what takes longest to load
STDERR = 2
FALSE_ALARM = b"has constructor arguments in the object store and max_restarts > 0"
PROJECT_ROOT = Path(__file__).resolve().parent.parent


def connect(loading: Sequence[str] = ()) -> None:
    """Join the cluster that `RAY_ADDRESS` or `ray job submit` names, else start a local one; no-op when connected.

    Workers of a local cluster get the project on their `PYTHONPATH`, so that an uninstalled checkout works as well.

    Args:
        loading: modules, none of them Ray's, that a thread imports while Ray waits for its processes to start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray

    if ray.is_initialized():
        return
    loader = threading.Thread(target=_load, args=(loading,), name="loading", daemon=True)
    loader.start()
    try:
        with waiting("starting Ray" if not os.environ.get("RAY_ADDRESS") else "joining the Ray cluster"):
            _init()
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray's own words; it raises a bare Exception
            raise
        raise UserError(
            "Ray did not start on this machine within the half minute that it gives itself: the machine is too busy; "
            "run the same command again when it has a core to spare, or start Ray once for all commands with "
            "`ray start --head` and RAY_ADDRESS=auto"
        ) from None
    finally:
        loader.join()


def _load(modules: Sequence[str]) -> None:
    for name in modules:
        importlib.import_module(name)


def _init() -> None:
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
        return
    # Ray may create a token file for a local, loopback-only cluster that a later `ray job submit` would then lack.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # nobody takes this machine away, and the actor that would look out for it is a process of 3 s of CPU
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # by the environment: with a runtime_env Ray would start other workers than those it has ready
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    atexit.register(ray.shutdown)  # Ray's own at the exit waits for the output of workers, which goes to files here


@contextmanager
def without_false_alarm() -> Iterator[None]:
    """While the block runs, keep one line of Ray's from stderr.

    Ray prints an error in red for every actor pool of Ray Data whose actors may restart, that is for all of them, from
    C++ and with no way to turn it off (ray-project/ray#57733). All else is passed on as it comes.
    """
    sys.stderr.flush()
    stderr = os.dup(STDERR)
    reading, writing = os.pipe()
    os.dup2(writing, STDERR)
    os.close(writing)

    def pass_on() -> None:
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                if FALSE_ALARM not in line:
                    os.write(stderr, line)

    thread = threading.Thread(target=pass_on, name="stderr", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, STDERR)  # the pipe ends here, but where a child process has it, too
        thread.join(timeout=1.0)


def in_cluster() -> bool:
    """Whether `connect` joins a cluster that is there already, rather than starting one on this machine."""
    import ray

    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))


def quiet_data_context() -> "DataContext":
    """Ray Data's settings in this driver, with its own logging and bars off: the jobs print their own progress."""
    from ray.data import DataContext  # sets the level of its logger when it is imported

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context
