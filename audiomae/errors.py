"""Every error that the product raises on purpose, on one base class.

A message says what is wrong, what was got, what was expected and how to put it right. Commands print it without a
traceback; the exit status is the class's own (`exit_status`), the service's status and code are in `serve/problems.py`.
"""


class AudioMAEError(Exception):
    """Base of all of them; `exit_status` is what a command exits with."""

    exit_status = 1


class UserError(AudioMAEError):
    """Something the user can fix: a missing corpus, a mismatch, a lost race."""


class ModelError(UserError, RuntimeError):
    """A model from elsewhere (timm, a text model) that cannot be loaded; the text says why and what is expected."""


class ListingError(UserError):
    """A listing (CSV, JSONL, Parquet) that cannot be read as one; the text names the column, line or encoding."""

    exit_status = 2


class ReleaseConflictError(UserError):
    """Another build published first, on the same base version; relaunching builds on theirs."""


class ConfigError(AudioMAEError, ValueError):
    """A configuration or command line that cannot be used."""

    exit_status = 2


class ColumnError(AudioMAEError, ValueError):
    """A column that a table does not have, or that holds something else than was asked for."""


class IntegrityError(AudioMAEError, RuntimeError):
    """Stored bytes are not what their receipt says. The text gives what, got, expected and the fix."""


class FilterError(AudioMAEError, ValueError):
    """A filter that does not fit the items table; the text names the column or operator and the nearest valid one."""


class DecodeError(AudioMAEError):
    """A file that gives no audio.

    Attributes:
        stage: where it failed: open | read | limits | decode | samples.
        error_class: a stable name to count by: NotFound, PermissionDenied, NotAFile, EmptyFile, UnknownFormat,
            ReadFailed, RateOutOfRange, TooManyChannels, TooLarge, TooLong, TooSlow, CorruptAudio, TruncatedFile,
            NoAudio, NonFiniteSamples, AmplitudeOutOfRange, NoSuchChannel; Gap (only of a lost span, or where such
            a span fails the file).
        message: one line for a person.
    """

    def __init__(self, stage: str, reason: str, error_class: str = "CorruptAudio") -> None:
        super().__init__(stage, reason, error_class)
        self.stage, self.message, self.error_class = stage, reason, error_class

    def __str__(self) -> str:
        return f"{self.error_class} ({self.stage}): {self.message}"


class ItemError(AudioMAEError):
    """Why an item gave no embedding, in the words of its failure row. `passing`: another try may succeed."""

    def __init__(self, stage: str, error_class: str, message: str, passing: bool = False) -> None:
        super().__init__(stage, error_class, message, passing)
        self.stage, self.error_class, self.message, self.passing = stage, error_class, message, passing


def in_short(error: BaseException, most: int = 300) -> str:
    """What somebody else's error says, in one line of at most so many characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[: most - 3] + "..."
