"""What goes wrong behind a request, as the answers that it gets."""

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from audiomae.errors import IntegrityError, UserError
from serve.problems import Problem

RELOAD_S = 900.0  # for every replica to open a release


def try_again(code: str, error: BaseException) -> Problem:
    """503 for what passes by itself."""
    return Problem(503, code, f"{reason(error)}; try again", headers={"Retry-After": "1"})


def refusal(error: BaseException) -> BaseException:
    """Why a release is not swapped to, as an answer; what is none of these goes on as it is."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, TimeoutError):
        return Problem(504, "timeout", f"not every replica opened the release within {RELOAD_S:g} s")
    if isinstance(cause, UserError):
        return Problem(404, "unknown_release", str(cause))
    if isinstance(cause, IntegrityError):
        return Problem(409, "release_refused", str(cause))
    if isinstance(cause, (ActorDiedError, ActorUnavailableError, BackPressureError, DeploymentUnavailableError)):
        return try_again("replica_lost", error)  # its replacement is starting
    return error


def timed_out(what: str, seconds: float) -> Problem:
    """504 for what did not come in time."""
    return Problem(504, "timeout", f"no answer from {what} within {seconds:g} s", headers={"Retry-After": "5"})


def reason(error: BaseException) -> str:
    """The message of an error, without the remote traceback that Ray adds to one from another process."""
    return str(getattr(error, "cause", None) or error)


def unknown_id(clip: int, version: str) -> Problem:
    """404 for an id that the serving release does not hold."""
    return Problem(404, "unknown_id", f"no item {clip} in release {version}")
