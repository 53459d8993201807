"""WebDataset tar shards: members that share a name are one sample; its sidecars become columns of its audio rows.

`000017.flac`, `000017.json`, `000017.cls` and `000017.txt` are the sample `000017`, wherever in the shard they lie: the
fields of the JSON object become columns, `.cls` becomes `label`, `.txt` becomes `caption`, unless the JSON has those.
Names may have dots (`Track 2.0.ogg`, `Track 2.0.json`); a sidecar with no sound of its own name belongs, as WebDataset
has it, to the sounds whose names go on after a dot (`000.json` to `000.left.wav` and `000.right.wav`). A row's uri is
`shard.tar#member`; `tar_offset` is where the member's bytes begin, so that it is read without the shard's directory.
"""

import codecs
import posixpath
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from audiomae.corpus.columns import own_names
from audiomae.corpus.folders import NOT_AUDIO_NAMES, TABLE_ROWS, Entry, is_hidden, may_be_audio
from audiomae.corpus.notes import Notes
from audiomae.corpus.paths import join, name_to_uri
from audiomae.corpus.read_as import ReadAs
from audiomae.corpus.sources import tar_directory
from audiomae.corpus.spool import parse_json, typed
from audiomae.corpus.tars import Directory, Member
from audiomae.errors import DecodeError

SIDECARS = (".json", ".cls", ".txt")
SIDECAR_BYTES = 1 << 20
UNPAIRED = "sidecars in tar shards without a sound of that name"
Row = dict[str, Any]


def tables(
    root: str, shards: Callable[[Notes], Iterator[Entry]], read_as: ReadAs
) -> Callable[[Notes], Iterator[pa.Table]]:
    """The samples of tar shards as manifest tables, as a function. A shard that is broken is itself a row, to fail."""
    return typed(f"tar shards under {root}", lambda notes: _chunks(root, shards(notes), notes), read_as)


def _chunks(root: str, shards: Iterator[Entry], notes: Notes) -> Iterator[list[Row]]:
    rows: list[Row] = []
    for shard in shards:
        rows += _shard_rows(root, shard, notes)
        while len(rows) >= TABLE_ROWS:
            yield rows[:TABLE_ROWS]
            rows = rows[TABLE_ROWS:]
    yield rows


def _shard_rows(root: str, shard: Entry, notes: Notes) -> list[Row]:
    broken: Row = {"uri": shard.uri, "size": shard.size, "content_id": shard.content_id, "tar_offset": None}
    try:
        directory = tar_directory(join(root, shard.uri), _is_sidecar)
    except DecodeError:
        return [broken]
    _note_faults(shard, directory, notes)
    sounds = [member for member in directory.members.values() if may_be_audio(member.name)]
    columns = _sidecar_columns(shard, directory, sounds, notes)
    rows = [
        {
            "uri": f"{shard.uri}#{member.name}",
            "size": member.size,
            "content_id": f"{shard.content_id}-{member.offset}-{member.size}",
            "tar_offset": member.offset,
            **columns.get(member.name, {}),
        }
        for member in sounds
    ]
    return [*rows, broken] if directory.fault else rows


def _note_faults(shard: Entry, directory: Directory, notes: Notes) -> None:
    if directory.fault:
        notes.add("tar shards that are damaged; their whole members are kept", f"{shard.uri}: {directory.fault}")
    elif not directory.ended:
        notes.add("tar shards without an end mark, which may have been cut", shard.uri)
    for name in directory.replaced:
        notes.add("members of tar shards replaced by a later one of the same name", f"{shard.uri}#{name}")
    for member in directory.members.values():
        if may_be_audio(member.name) and member.reason:
            notes.add("members of tar shards that cannot be read", f"{shard.uri}#{member.name}: {member.reason}")


# --- sidecars ---------------------------------------------------------------------------------------------------------


def _is_sidecar(name: str, size: int) -> bool:
    return size <= SIDECAR_BYTES and _sidecar_kind(name) is not None


def _sidecar_kind(name: str) -> str | None:
    suffix = posixpath.splitext(name)[1].lower()
    return suffix if suffix in SIDECARS and not is_hidden(name) else None


def _sidecar_columns(shard: Entry, directory: Directory, sounds: list[Member], notes: Notes) -> dict[str, Row]:
    """Columns of each sound, from its sidecars: the more of the name they share, the later they are applied."""
    names = _SoundNames(sounds)
    found: dict[str, list[tuple[int, str, Member]]] = {}
    for member in directory.members.values():
        kind = _sidecar_kind(member.name)
        if kind is None:
            continue
        where = f"{shard.uri}#{member.name}"
        owners, closeness = names.of(posixpath.normpath(member.name)[: -len(kind)])
        if not owners:
            base = posixpath.basename(member.name).lower()
            if posixpath.splitext(base)[0] not in NOT_AUDIO_NAMES:
                notes.add(UNPAIRED, where)
        elif member.data is None:
            notes.add(f"sidecars in tar shards not read, over {SIDECAR_BYTES >> 20} MiB or no plain file", where)
        for name in owners if member.data is not None else []:
            found.setdefault(name, []).append((closeness, kind, member))
    return {name: _columns(shard, sidecars, notes) for name, sidecars in found.items()}


class _SoundNames:
    """Finds the sounds that a sidecar belongs to."""

    def __init__(self, sounds: list[Member]) -> None:
        self._by_key: dict[str, dict[str, list[str]]] = {"whole": {}, "stem": {}, "prefix": {}}
        for sound in sounds:
            path = posixpath.normpath(sound.name)
            folder, slash, base = path.rpartition("/")
            self._by_key["whole"].setdefault(path, []).append(sound.name)
            self._by_key["stem"].setdefault(folder + slash + base.rpartition(".")[0], []).append(sound.name)
            for at, character in enumerate(base):
                if character == "." and at:
                    self._by_key["prefix"].setdefault(folder + slash + base[:at], []).append(sound.name)

    def of(self, stem: str) -> tuple[list[str], int]:
        """(names of the sounds of a sidecar whose name without suffix is `stem`, how close they are)."""
        for closeness, key in ((1 << 20, "whole"), (1 << 20, "stem"), (len(stem), "prefix")):
            if stem in self._by_key[key]:
                return self._by_key[key][stem], closeness
        folder, slash, base = stem.rpartition("/")
        while "." in base:  # 000.meta.json belongs to 000.wav
            base = base.rpartition(".")[0]
            if base and folder + slash + base in self._by_key["stem"]:
                return self._by_key["stem"][folder + slash + base], len(base)
        return [], 0


def _columns(shard: Entry, sidecars: list[tuple[int, str, Member]], notes: Notes) -> Row:
    """`label` and `caption` of the closest `.cls` and `.txt`, then the fields of every JSON object."""
    columns: Row = {}
    order = {".cls": 0, ".txt": 0, ".json": 1}
    for _, kind, member in sorted(sidecars, key=lambda item: (order[item[1]], item[0], item[2].name)):
        text = _text(member.data or b"").strip()
        if kind == ".cls":
            columns["label"] = text
        elif kind == ".txt":
            columns["caption"] = text
        else:
            columns.update(_fields(text, f"{shard.uri}#{member.name}", notes))
    return columns


def _fields(text: str, where: str, notes: Notes) -> Row:
    try:
        fields = parse_json(text)
    except (ValueError, RecursionError) as error:
        notes.add("JSON sidecars that are no JSON object, kept as text in the column json", f"{where}: {error}")
        return {"json": text}
    if not isinstance(fields, dict):
        notes.add("JSON sidecars that are no JSON object, kept as text in the column json", where)
        return {"json": text}
    names = own_names(fields)
    return {names[name]: value for name, value in fields.items()}


def _text(data: bytes) -> str:
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    return name_to_uri(data)
