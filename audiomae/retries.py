"""The one way to try again what may pass: a lost connection, a server that asks to slow down, a process that died."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def retry(call: Callable[[], T], passing: Callable[[Exception], bool], attempts: int, first_wait_s: float = 0.1) -> T:
    """The first answer of `call`; errors that may pass are tried again.

    Args:
        call: what to do.
        passing: whether another try may go better after this error.
        attempts: tries in all.
        first_wait_s: the longest wait before the second try; it doubles with each, and half of it is random, so that
            many clients do not come back at once.

    Raises:
        Exception: the first error that does not pass, or that of the last try.
    """
    for attempt in range(1, attempts + 1):
        try:
            return call()
        except Exception as error:
            if attempt == attempts or not passing(error):
                raise
        time.sleep(first_wait_s * 2 ** (attempt - 1) * random.uniform(0.5, 1))
    raise ValueError(f"attempts is {attempts}, expected at least 1")
