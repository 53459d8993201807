"""Which artifacts lie below a folder, what their receipts say, and whether every file is what they say.

An artifact is known by where its receipt lies; `KINDS` is the list of those places.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from upath import UPath

from audiomae.artifacts import embeddings, receipts, releases, runs, shard_cache
from audiomae.artifacts.receipts import FileEntry, Receipt
from audiomae.errors import IntegrityError, UserError
from audiomae.storage import Location, list_names, list_sizes, to_path

THREADS = 8
LEVELS_UP = 2  # how far above the folder asked for its receipts may lie

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Found:
    """One receipt (or sealed record) and what it says.

    Attributes:
        kind: what it belongs to.
        path: where it lies.
        root: what the names of its files are relative to.
        receipt: its files and facts.
        optional: the folder of its files may have been removed since (an old version of an index).
    """

    kind: str
    path: UPath
    root: UPath
    receipt: Receipt
    optional: bool = False


@dataclass
class Report:
    """What `verify` found: `problems` by the path of the file, and how much there was."""

    receipts: int = 0
    files: int = 0
    bytes: int = 0
    unnamed: int = 0
    problems: dict[str, str] = field(default_factory=dict)


Read = Callable[[UPath], Receipt]


@dataclass(frozen=True)
class Kind:
    """Where receipts of one kind lie (a pattern of the end of their path) and how they are read."""

    name: str
    pattern: re.Pattern[str]
    levels: int
    read: Read
    optional: bool = False


def _shard(path: UPath) -> Receipt:
    found = embeddings.read_receipt(path.parent.parent, path.stem)
    return Receipt(found.files, found.model_dump(exclude={"files"}))


def _feature_shard(path: UPath) -> Receipt:
    return shard_cache.read_receipt(path.parent, int(path.stem.rpartition("-")[2]))


def _plan(path: UPath) -> Receipt:
    value = receipts.read_sealed(path, embeddings.UNSEALED_PLAN, embeddings.FIX_RUN)
    named = [*value["files"], *([value["vanished"]] if value.get("vanished") else [])]
    files = {file["name"]: FileEntry(file["sha256"], file.get("bytes")) for file in named}
    facts = {name: value[name] for name in ("generation", "encoder", "corpus_root", "settings") if name in value}
    return Receipt(files, facts | {"shards": len(value["shards"])})


def _run_record(path: UPath) -> Receipt:
    return Receipt({}, receipts.read_sealed(path, embeddings.UNSEALED_RUN, embeddings.FIX_RUN))


def _artifact(path: UPath) -> Receipt:
    """An encoder, checkpoint, evaluation or index part; parts of older versions named checksums alone."""
    value = receipts.read_sealed(path, {"rows", "files"})
    if "facts" in value:
        return Receipt.decode(value, path)
    return Receipt({name: FileEntry(sha256) for name, sha256 in value["files"].items()}, {"rows": value["rows"]})


def _release(path: UPath) -> Receipt:
    return releases._read_receipt(path.parent)


def _record(path: UPath) -> Receipt:
    return Receipt({}, receipts.read_sealed(path))


def _history_entry(path: UPath) -> Receipt:
    entry = receipts.read_sealed(path, releases.UNSEALED_ENTRY)
    return Receipt({f"{entry['version']}/{releases.RELEASE_FILE}": FileEntry(entry["release_sha256"])}, entry)


# the first pattern that fits says what a file is
KINDS = (
    Kind("embedding shard", re.compile(r"/commits/[^/]+\.json$"), 2, _shard),
    Kind("embedding plan", re.compile(r"/manifest/plan-\d{6,}\.json$"), 2, _plan),
    Kind("embedding run", re.compile(r"/run\.json$"), 1, _run_record),
    Kind("embedding precision", re.compile(rf"/{re.escape(embeddings.PRECISION_FILE)}$"), 1, _record),
    Kind("feature shard", re.compile(r"/shard-\d{5,}\.json$"), 1, _feature_shard),
    Kind("index history", re.compile(r"/history/\d{6,}\.json$"), 2, _history_entry, optional=True),
    Kind("index release", re.compile(rf"/{re.escape(releases.RELEASE_FILE)}$"), 1, _release),
    Kind("training run", re.compile(rf"/{re.escape(runs.RUN_FILE)}$"), 1, runs.read_receipt),
    Kind("ablation result", re.compile(r"/results/[^/]+/fold-[^/]+\.json$"), 3, receipts.read_result),
    Kind("artifact", re.compile(rf"/{re.escape(receipts.RECEIPT_FILE)}$"), 1, _artifact),
)


def find(path: Location) -> tuple[list[Found], dict[str, str], Mapping[str, int]]:
    """(receipts, problems of unreadable ones by path, bytes of every file by name) below a folder.

    When there is no receipt below it, those of the folders above that name a file below it.

    Raises:
        UserError: there is nothing, or nothing that a receipt names.
    """
    base = to_path(path)
    sizes = list_sizes(base)
    found, problems = _read_all(base, list(sizes))
    if found or problems:
        return found, problems, sizes
    above = base
    for _ in range(LEVELS_UP):
        above = above.parent
        names = [name for name in list_sizes(above) if name.count("/") <= 1]
        found, problems = _read_all(above, names)
        own = [item for item in (_below(item, base) for item in found) if item.receipt.files]
        if own:
            return own, problems, sizes or {base.name: 0}
    raise UserError(
        f"{base}: no receipt here or above that names what lies here; expected what a job wrote: embeddings, an "
        "index, a training run, an encoder, features, an evaluation, or a folder of them"
    )


def verify(path: Location, started: Callable[[int], OnBytes] = lambda total: lambda count: None) -> Report:
    """Check every file that a receipt below `path` names, several at a time.

    Args:
        path: any artifact, a part of one, or a folder of them; local or S3.
        started: is told how many bytes there are to read; what it returns is told of each part that was read.

    Raises:
        UserError: as for `find`.
    """
    found, problems, sizes = find(path)
    checks: dict[str, Callable[[], int]] = {}
    for item in found:
        for name, entry in item.receipt.files.items():
            checks[str(item.root / name)] = partial(_check, item, name, entry)
    on_bytes = started(sum(sizes.values()))
    report = Report(receipts=len(found) + len(problems), problems=dict(problems))
    with ThreadPoolExecutor(THREADS) as pool:
        pending = {pool.submit(check): where for where, check in checks.items()}
        for done in as_completed(pending):
            try:
                count = done.result()
                report.files += 1
                report.bytes += count
                on_bytes(count)
            except (IntegrityError, OSError) as error:
                report.problems[pending[done]] = str(error)
    named = {*checks, *(str(item.path) for item in found), *problems}
    base = to_path(path)
    report.unnamed = sum(str(base / name) not in named for name in sizes) if len(sizes) > 1 else 0
    return report


def describe(path: Location) -> Iterator[str]:
    """Lines on every artifact below `path`: its kind, where it lies, how much it is, what it says of itself."""
    found, problems, sizes = find(path)
    base = to_path(path)
    bytes_of = {str(base / name): size for name, size in sizes.items()}
    groups: dict[tuple[str, str], list[Found]] = {}
    for item in found:
        groups.setdefault((str(item.root), item.kind), []).append(item)
    for (root, kind), items in sorted(groups.items()):
        files = {str(item.root / name) for item in items for name in item.receipt.files}
        total = sum(bytes_of.get(name, 0) for name in files)
        many = f"{len(items)} {kind}s" if len(items) > 1 else kind
        yield f"{root}: {many}, {len(files)} files, {total / 1e6:,.1f} MB"
        for name, value in sorted(_facts([item.receipt.facts for item in items]).items()):
            yield f"  {name}: {value}"
    yield from (f"damaged: {reason}" for reason in problems.values())


def _facts(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one receipt its facts; of many the sums of their counts and what they all have in common."""
    if len(facts) == 1:
        return {name: value for name, value in facts[0].items() if len(str(value)) <= 200}
    sums: Counter[str] = Counter()
    for each in facts:
        sums.update({name: value for name, value in each.items() if type(value) in (int, float)})
    common = {
        name: value
        for name, value in facts[0].items()
        if name not in sums and len(str(value)) <= 200 and all(each.get(name) == value for each in facts)
    }
    return common | {name: round(value, 3) for name, value in sums.items()}


def _read_all(base: UPath, names: Sequence[str]) -> tuple[list[Found], dict[str, str]]:
    places = [(kind, base / name) for name in names if (kind := kind_of(f"/{base.name}/{name}"))]
    found: list[Found] = []
    problems: dict[str, str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for (_, path), item in zip(places, pool.map(lambda place: _read(*place), places), strict=True):
            if isinstance(item, Found):
                found.append(item)
            else:
                problems[str(path)] = item
    return found, problems


def kind_of(path: str) -> Kind | None:
    """What the file at this path is the receipt of."""
    return next((kind for kind in KINDS if kind.pattern.search(path)), None)


def _read(kind: Kind, path: UPath) -> Found | str:
    root = path
    for _ in range(kind.levels):
        root = root.parent
    try:
        return Found(kind.name, path, root, kind.read(path), kind.optional)
    except (IntegrityError, OSError) as error:
        return str(error)
    except (KeyError, TypeError, ValueError) as error:
        return f"{path}: damaged: {type(error).__name__}: {error}"


def _below(item: Found, base: UPath) -> Found:
    own = str(base).rstrip("/")
    files = {
        name: entry
        for name, entry in item.receipt.files.items()
        if str(item.root / name) == own or str(item.root / name).startswith(own + "/")
    }
    return Found(item.kind, item.path, item.root, Receipt(files, item.receipt.facts), item.optional)


def _check(item: Found, name: str, entry: FileEntry) -> int:
    """Bytes of a file that is what its receipt says; 0 for one whose whole folder was removed and may be."""
    if item.optional and not list_names((item.root / name).parent):
        return 0
    return receipts.verify_file(item.root, name, entry)
