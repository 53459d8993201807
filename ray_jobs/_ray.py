"""Connecting to Ray the same way in every job."""

import importlib
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from audiomae.cli import waiting

if TYPE_CHECKING:
    from ray.data import DataContext

ENCODER = "audiomae.model.encoder"  # what takes longest to load
PROJECT_ROOT = Path(__file__).resolve().parent.parent


def connect(loading: Sequence[str] = ()) -> None:
    """Join the cluster that `RAY_ADDRESS` or `ray job submit` names, else start a local one; no-op when connected.

    Workers of a local cluster get the project on their `PYTHONPATH`, so that an uninstalled checkout works as well.

    Args:
        loading: modules, none of them Ray's, that a thread imports while Ray waits for its processes to start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # for every actor pool of Ray Data it prints an error in red (ray-project/ray#57733); what goes wrong is raised, too
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        return
    loader = threading.Thread(target=_load, args=(loading,), name="loading", daemon=True)
    loader.start()
    try:
        with waiting("starting Ray" if not os.environ.get("RAY_ADDRESS") else "joining the Ray cluster"):
            _init()
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
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy machine needs more than the default of 30
    # Ray may create a token file for a local, loopback-only cluster that a later `ray job submit` would then lack.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # by the environment: with a runtime_env Ray would start other workers than those it has ready
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


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
