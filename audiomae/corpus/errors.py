"""The one error of reading a corpus file, with a stable class to count failures by."""


class DecodeError(Exception):
    """A file that gives no audio.

    Attributes:
        stage: where it failed: open | read | limits | decode | samples.
        error_class: a stable name to count by: NotFound, PermissionDenied, NotAFile, EmptyFile, UnknownFormat,
            ReadFailed, RateOutOfRange, TooManyChannels, TooLarge, TooLong, TooSlow, CorruptAudio, TruncatedFile,
            NoAudio, NonFiniteSamples, AmplitudeOutOfRange.
        message: one line for a person.
    """

    def __init__(self, stage: str, reason: str, error_class: str = "CorruptAudio") -> None:
        super().__init__(stage, reason, error_class)
        self.stage, self.message, self.error_class = stage, reason, error_class

    def __str__(self) -> str:
        return f"{self.error_class} ({self.stage}): {self.message}"
