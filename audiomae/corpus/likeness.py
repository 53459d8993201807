"""Names that are equal or only look it: one uri twice, one file under two spellings, labels hard to tell apart."""

import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from audiomae.corpus.notes import Notes
from audiomae.corpus.paths import is_s3, join, scheme_of
from audiomae.errors import ListingError

LABEL = "label"
MAX_LABELS = 100_000
LOOK_ALIKES = "groups of labels that look alike but are classes of their own"
TWO_SPELLINGS = "uris that spell the path of another row in a different way: their clips come twice"
TWINS = "uris that differ from another row only in how accents are encoded (NFC, NFD)"
ODD_URI = r"^file:|(^|/)\.{1,2}/|(^|[^:])//"
MAX_ODD = 1 << 20  # of uris that another spelling is looked for
NO_SPACE = "\u200b\u200c\u200d\u2060\ufeff\u00ad"
# letters of other scripts that are drawn as Latin ones
HOMOGLYPHS = str.maketrans("аеорсухіјѕԁһԛԝѵΑΒΕΖΗΙΚΜΝΟΡΤΥΧοАВЕКМНОРСТУХ", "aeopcyxijsdhqwvABEZHIKMNOPTYXoABEKMHOPCTYX")


class Likeness:
    """Looks at the tables of a corpus as they go by, at about 8 bytes of memory per row.

    Args:
        source: the corpus as the user knows it, for messages.
        root: of its relative uris.
        notes: where `close` says what it found.
    """

    def __init__(self, source: str, root: str, notes: Notes) -> None:
        self._source, self._root, self._notes = source, root, notes
        self._hashes: list[np.ndarray] = []
        self._all: np.ndarray | None = None
        self._odd: list[str] = []
        self._labels: set[str] = set()

    def look(self, table: pa.Table) -> None:
        """Take a table into account."""
        column = table["uri"]
        uris = column.to_pylist()
        self._hashes.append(np.fromiter(map(hash, uris), np.int64, len(uris)))
        if len(self._odd) < MAX_ODD:
            odd = pc.or_(
                pc.match_substring_regex(column, ODD_URI), pc.not_equal(pc.utf8_normalize(column, "NFC"), column)
            )
            if self._root and not is_s3(self._root):
                odd = pc.or_(odd, pc.starts_with(column, self._root.rstrip("/") + "/"))
            self._odd += column.filter(odd).to_pylist()
        if LABEL in table.column_names and pa.types.is_string(table[LABEL].type) and len(self._labels) < MAX_LABELS:
            self._labels.update(pc.unique(table[LABEL].drop_null()).to_pylist())

    def repeated(self) -> bool:
        """Whether some uri may come twice (a hash does)."""
        hashes = self._sorted()
        return bool((hashes[1:] == hashes[:-1]).any())

    def refuse_repeated(self, uris: Iterable[str]) -> None:
        """Given the uris once more, refuse those that really come twice: their clips would share ids."""
        hashes = self._sorted()
        suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        seen: set[str] = set()
        extra = 0
        examples: list[str] = []
        for uri in uris:
            if hash(uri) in suspects:
                if uri in seen:
                    extra += 1
                    examples += [uri] if len(examples) < 3 and uri not in examples else []
                seen.add(uri)
        if extra:
            raise ListingError(
                f"{self._source}: {extra:,} rows repeat the uri of another row (e.g. {', '.join(examples)}); a uri may "
                "be listed once"
            )

    def close(self) -> None:
        """Say what is there under two spellings."""
        for group in look_alikes(self._labels):
            self._notes.add(LOOK_ALIKES, " / ".join(map(shown, group)))
        self._note_spellings()

    def _note_spellings(self) -> None:
        """A row is a twin if its plain spelling is another row, or the plain spelling of another row."""
        plain: dict[str, str] = {}
        hashes = self._sorted()
        if len(self._odd) >= MAX_ODD:
            self._notes.add("unusual spellings of uris; some were not compared with the other rows", count=MAX_ODD)
        for uri in dict.fromkeys(self._odd):
            for spelling in self._spellings(uri):
                if spelling == uri:
                    continue
                what = TWINS if unicodedata.normalize("NFC", uri) == unicodedata.normalize("NFC", spelling) else None
                if spelling in plain or _holds(hashes, hash(spelling)):
                    other = plain.get(spelling, spelling)
                    self._notes.add(what or TWO_SPELLINGS, f"{shown(uri)} and {shown(other)}")
                    break
                plain[spelling] = uri

    def _spellings(self, uri: str) -> Iterator[str]:
        """The ways in which another row may spell the same path."""
        path = uri
        full = join(self._root, uri)
        if not is_s3(full) and not scheme_of(full):
            path = posixpath.normpath(full)
            root = self._root.rstrip("/") + "/"
            path = path.removeprefix(root) if self._root and path.startswith(root) else path
            if path.startswith("//"):
                path = path[1:]
        yield unicodedata.normalize("NFC", path)

    def _sorted(self) -> np.ndarray:
        if self._all is None:
            self._all = np.sort(np.concatenate(self._hashes)) if self._hashes else np.empty(0, np.int64)
            self._hashes = []
        return self._all


def look_alikes(labels: Iterable[str]) -> list[list[str]]:
    """Groups of labels that a person takes for one: other accents' encoding, case, spaces, dashes, alphabet, or digits
    of the same number (1.1 and 1.10)."""
    groups: dict[str, list[str]] = {}
    for label in sorted(set(labels)):
        groups.setdefault(_key(label), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def shown(text: str) -> str:
    """A name in quotes, with what cannot be seen in it spelled out where it is not plain."""
    plain = unicodedata.normalize("NFC", text)
    visible = plain == text and text.isprintable() and text.translate(HOMOGLYPHS) == text
    return f"'{text}'" if visible else ascii(text)


def _key(label: str) -> str:
    text = unicodedata.normalize("NFKC", label.translate({ord(mark): None for mark in NO_SPACE})).translate(HOMOGLYPHS)
    text = re.sub(r"[\s_\-\u2010-\u2015]+", " ", text.casefold()).strip()
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text):
        return f"number {float(text)!r}"
    return text


def _holds(ordered: np.ndarray, value: int) -> bool:
    at = int(np.searchsorted(ordered, value))
    return at < len(ordered) and int(ordered[at]) == value
