"""What a listing has to say besides its rows: counted remarks, each with a few examples."""

from collections.abc import Iterator
from typing import NamedTuple

MAX_EXAMPLES = 3


class Remark(NamedTuple):
    """How often something was seen, and the first few cases."""

    cases: int
    examples: tuple[str, ...]


class Notes:
    """Remarks by what they are about, in the order of their first case."""

    def __init__(self) -> None:
        self._remarks: dict[str, Remark] = {}

    def add(self, what: str, example: str = "", count: int = 1) -> None:
        """Count one more case (or `count`); `what` reads well after a number: "sidecars without a sound"."""
        before = self._remarks.get(what, Remark(0, ()))
        examples = before.examples
        if example and len(examples) < MAX_EXAMPLES and example not in examples:
            examples = (*examples, example)
        self._remarks[what] = Remark(before.cases + count, examples)

    def clear(self) -> None:
        """Forget all."""
        self._remarks.clear()

    def take(self, other: "Notes") -> None:
        """Add what another pass over the same source has noted."""
        for what, remark in other._remarks.items():
            for number, example in enumerate(remark.examples or ("",)):
                self.add(what, example, 0 if number else remark.cases)

    def items(self) -> Iterator[tuple[str, Remark]]:
        """(what, remark) of each."""
        return iter(self._remarks.items())

    def get(self, what: str) -> Remark:
        """The remark, of no cases where there is none."""
        return self._remarks.get(what, Remark(0, ()))

    def lines(self) -> list[str]:
        """One line for a person per remark."""
        return [
            f"{remark.cases:,} {what}" + (f" (e.g. {', '.join(remark.examples)})" if remark.examples else "")
            for what, remark in self._remarks.items()
        ]
