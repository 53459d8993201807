"""The directory of a tar file: where the bytes of each member are, links resolved, whatever state the file is in."""

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from audiomae.corpus.paths import name_to_uri

BLOCK_BYTES = 512
SCAN_BYTES = 1 << 20
MAX_LINKS = 40
MAGIC_AT, MAGIC = 257, b"ustar"


class Member(NamedTuple):
    """A member that is no folder.

    Attributes:
        name: as in the tar; bytes that are not UTF-8 are spelled `\\xNN`.
        offset: of its bytes in the tar; `None`: there are none to be read, for `reason`.
        size: of its bytes; -1 where there are none.
        reason: why it cannot be read, else empty.
        data: its bytes, where they were asked for.
    """

    name: str
    offset: int | None
    size: int
    reason: str = ""
    data: bytes | None = None


@dataclass
class Directory:
    """What a tar holds.

    Attributes:
        members: by name, in the order of the file; of members with one name the last, as `tar -x` has it.
        fault: why the directory is not complete, else empty. `members` then holds those before the fault.
        replaced: names that came more than once.
        ended: whether the end-of-archive mark is there; without it the file may have been cut between two members.
    """

    members: dict[str, Member] = field(default_factory=dict)
    fault: str = ""
    replaced: list[str] = field(default_factory=list)
    ended: bool = True


def read_directory(file: BinaryIO, wanted: Callable[[str, int], bool] = lambda name, size: False) -> Directory:
    """Read all headers of a tar.

    Args:
        file: seekable, at its start.
        wanted: (name, size) -> whether the member's bytes are to be kept as its `data`.
    """
    found = Directory()
    links: dict[str, str] = {}
    size = file.seek(0, 2)
    start = 0
    while start < size:
        before, count = start, len(found.members)
        try:
            start = _one_archive(file, start, size, wanted, found, links)
        except (tarfile.TarError, EOFError) as error:
            found.fault = found.fault or str(error) or type(error).__name__
            break
        if start == before and len(found.members) == count:  # what lies here is no header
            found.fault = found.fault or f"no header at byte {start}"
            start = _next_header(file, start + BLOCK_BYTES, size)
    if not size:
        found.fault = "the file is empty"
    by_path = {posixpath.normpath(name): member for name, member in found.members.items()}
    for name in links:
        found.members[name] = _resolved(name, links, by_path)
    return found


def _one_archive(
    file: BinaryIO,
    start: int,
    size: int,
    wanted: Callable[[str, int], bool],
    found: Directory,
    links: dict[str, str],
) -> int:
    """Members of the archive at `start`; where a further one starts (`cat a.tar b.tar`), or the size of the file."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for entry in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has seen otherwise
            if entry.isdir():
                continue
            name = name_to_uri(entry.name.encode("utf-8", "surrogateescape"))
            member = _member(name, entry)
            if entry.islnk() or entry.issym():
                target = name_to_uri(entry.linkname.encode("utf-8", "surrogateescape"))
                links[name] = target if entry.islnk() else posixpath.join(posixpath.dirname(name), target)
            else:
                links.pop(name, None)
            if member.offset is not None and wanted(name, member.size):
                file.seek(member.offset)
                member = member._replace(data=file.read(member.size))
            if found.members.pop(name, None) is not None:
                found.replaced.append(name)
            found.members[name] = member
        end: int = archive.offset
    found.ended = end < size
    return _next_block(file, end, size)


def _member(name: str, entry: tarfile.TarInfo) -> Member:
    if entry.issparse():
        return Member(name, None, -1, "a sparse member; pack the shard without --sparse")
    if entry.isreg():
        return Member(name, entry.offset_data, entry.size)
    return Member(name, None, -1, "neither a file nor a link to one")


def _resolved(name: str, links: dict[str, str], by_path: dict[str, Member]) -> Member:
    """The member that a hard or symbolic link leads to, under the link's own name."""
    at = name
    for _ in range(MAX_LINKS):
        if at not in links:
            break
        target = posixpath.normpath(links[at])
        member = by_path.get(target)
        if member is None:
            return Member(name, None, -1, f"a link to {links[name]!r}, which is not in the tar")
        at = member.name
    else:
        return Member(name, None, -1, f"a link to {links[name]!r} that leads nowhere, in a circle")
    member = by_path[posixpath.normpath(at)]
    return member._replace(name=name)


def _next_block(file: BinaryIO, start: int, size: int) -> int:
    """The first 512-byte block from `start` on that is not all zeros, or `size`."""
    start = -(-start // BLOCK_BYTES) * BLOCK_BYTES
    file.seek(start)
    while start < size and (data := file.read(SCAN_BYTES)):
        rest = data.lstrip(b"\0")
        if rest:
            return start + (len(data) - len(rest)) // BLOCK_BYTES * BLOCK_BYTES
        start += len(data)
    return size


def _next_header(file: BinaryIO, start: int, size: int) -> int:
    """The first 512-byte block from `start` on that has the mark of a tar header, or `size`."""
    file.seek(start)
    while start < size and (data := file.read(SCAN_BYTES)):
        for at in range(0, len(data), BLOCK_BYTES):
            if data[at + MAGIC_AT : at + MAGIC_AT + len(MAGIC)] == MAGIC:
                return start + at
        start += len(data)
    return size


def split_member(full: str) -> Iterator[tuple[str, str]]:
    """(tar, member) at each place where `x.tar#member` may be split, leftmost first."""
    at, lower = 0, full.lower()
    while (at := lower.find(".tar#", at)) >= 0:
        if at and full[at - 1] != "/" and at + 5 < len(full):
            yield full[: at + 4], full[at + 5 :]
        at += 5
