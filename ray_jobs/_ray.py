"""Connecting to Ray the same way in every job."""

import logging
import os
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent


def connect() -> None:
    """Join the cluster that `RAY_ADDRESS` or `ray job submit` names, else start a local one; no-op when connected.

    Workers of a local cluster get the project on their `PYTHONPATH`, so that an uninstalled checkout works as well.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the jobs print their own progress
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
        return
    # Ray may create a token file for a local, loopback-only cluster that a later `ray job submit` would then lack.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # through the environment rather than a runtime_env, which would make Ray start other workers than those it has ready
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
