"""The pieces that a build makes on its way: each a directory of its own, finished when its receipt is there."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upath import UPath

from audiomae import storage
from audiomae.artifacts import receipts, releases
from audiomae.errors import IntegrityError
from audiomae.scratch import scratch
from audiomae.search.plan import Part, SegmentPlan
from audiomae.search.spec import IndexSpec


@dataclass(frozen=True)
class Place:
    """Where a build works.

    Attributes:
        index: INDEX, local or s3://.
        prefix: what all names of the build begin with.
        base: the version directory of the release that is extended, for one of an older form; else empty.
    """

    index: str
    prefix: str
    base: str = ""

    def part(self, part: Part) -> str:
        """The piece that a part is."""
        return f"parts/{self.prefix}-{part.key}"

    def segment(self, plan: SegmentPlan, spec: IndexSpec, quantiser: str) -> str:
        """The piece that a segment is."""
        facts = [plan.key, spec.kind, spec.factory, quantiser.rpartition("-")[2]]
        return f"segments/{self.prefix}-{storage.sha256_bytes(storage.encode_json(facts))[:16]}"

    def path(self, name: str) -> UPath:
        """Where a piece lies; that of a release of an older form is the version itself."""
        return storage.to_path(self.index) / name if name else storage.to_path(self.base)


def make_piece(place: Place, name: str, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Make a piece with `write`, unless it is finished and whole; return its facts."""
    done = releases.read_piece(place.index, name)
    if done is not None:
        try:
            receipts.verify(place.path(name), done[0])
            return dict(done[0].facts)
        except IntegrityError:
            receipts.withdraw(place.path(name) / receipts.RECEIPT_FILE)
    with releases.work_folder(place.index, f"{place.prefix}-") as work:
        facts = write(work)
        releases.create_piece(place.index, name, work, facts)
    return facts


def receipt_of(place: Place, name: str) -> receipts.Receipt:
    """The receipt of a finished piece."""
    return _finished(place, name)[0]


def checksum_of(place: Place, name: str) -> str:
    """The checksum of the receipt of a finished piece."""
    return _finished(place, name)[1]


def _finished(place: Place, name: str) -> tuple[receipts.Receipt, str]:
    """The receipt of a finished piece and its checksum; IntegrityError when another build's clean-up has removed it."""
    found = releases.read_piece(place.index, name)
    if found is None:
        raise IntegrityError(f"{place.path(name)}: not there any more; run the same command again")
    return found


@contextmanager
def local_copy(path: UPath, files: tuple[str, ...] | None) -> Iterator[Path]:
    """A local directory with the files of a piece (all, or those named that exist): itself, or a copy while needed."""
    if storage.is_local(path):
        yield Path(str(path))
        return
    with scratch("piece") as target:
        for name in storage.list_names(path):
            if files is None or name in files:
                storage.copy_file(path / name, target / name)
        yield target


@contextmanager
def each_local(paths: Sequence[UPath], files: tuple[str, ...] | None) -> Iterator[list[Path]]:
    """`local_copy` of several pieces."""
    with ExitStack() as stack:
        yield [stack.enter_context(local_copy(path, files)) for path in paths]
