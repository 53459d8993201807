"""Tar shards as people make them: sidecars anywhere, links, long and odd names, cut and joined files."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from audiomae.corpus.manifest import list_corpus, open_source
from audiomae.errors import DecodeError
from tests.unit.corpus.test_manifest import put, sound


def pack(path: Path, *members: Any, end: bool = True, format: int = tarfile.GNU_FORMAT) -> Path:
    """Members are (name, bytes) or finished `TarInfo`s without bytes."""
    file = io.BytesIO()
    archive = tarfile.open(fileobj=file, mode="w", format=format)  # noqa: SIM115
    for member in members:
        info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
        data = b"" if isinstance(member, tarfile.TarInfo) else member[1]
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    if end:
        archive.close()
    path.write_bytes(file.getvalue())
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def listed(src: object) -> tuple[dict[str, dict[str, Any]], str]:
    corpus = list_corpus(str(src))
    rows = pa.concat_tables(corpus.batches()).to_pylist()
    return {row["uri"].partition("#")[2] or row["uri"]: row for row in rows}, "\n".join(corpus.notes.lines())


def content(folder: Path, row: dict[str, Any], by_offset: bool = True) -> bytes:
    place = (row["tar_offset"], row["size"]) if by_offset else (None, None)
    data = open_source(str(folder), row["uri"], *place)
    assert isinstance(data, bytes)
    return data


def test_sidecars_with_dots_anywhere_in_the_shard(tmp_path: Path) -> None:
    pack(
        tmp_path / "a.tar",
        ("Track 2.0 (Clean).json", b'{"label": "clean"}'),
        ("5-1.5s.cls", b"7\n"),
        ("000.json", b'{"take": 1, "who": "both"}'),
        ("000.right.json", b'{"who": "right"}'),
        ("Track 2.0 (Clean).ogg", sound(0)),
        ("Track 2.1 (Live).ogg", sound(1)),
        ("5-1.5s.ogg", sound(2)),
        ("000.left.wav", sound(3)),
        ("000.right.wav", sound(4)),
        ("x.wav", sound(5)),
        ("x.wav.txt", b"with its suffix"),
        ("y.wav", sound(6)),
        ("y.meta.json", b'{"take": 5}'),
        ("d/001.wav", sound(7)),
        ("./d/001.txt", b"in a folder"),
        ("001.txt", b"not in that folder"),
        ("._y.json", b"hidden"),
        ("README.txt", b"no sidecar"),
        ("lost.cls", b"3"),
    )
    rows, said = listed(tmp_path / "a.tar")
    assert rows["Track 2.0 (Clean).ogg"]["label"] == "clean" and rows["Track 2.1 (Live).ogg"]["label"] is None
    assert rows["5-1.5s.ogg"]["label"] == "7"
    assert [(rows[f"000.{side}.wav"]["take"], rows[f"000.{side}.wav"]["who"]) for side in ("left", "right")] == [
        (1, "both"),
        (1, "right"),
    ]
    assert rows["x.wav"]["caption"] == "with its suffix" and rows["y.wav"]["take"] == 5
    assert rows["d/001.wav"]["caption"] == "in a folder"
    assert "2 sidecars in tar shards without a sound of that name (e.g. a.tar#001.txt, a.tar#lost.cls)" in said


def test_sidecars_that_say_nothing_usable_are_said(tmp_path: Path) -> None:
    pack(
        tmp_path / "a.tar",
        ("1.wav", sound()),
        ("1.json", b'{"a": 1, "a": 2}'),
        ("2.wav", sound(2)),
        ("2.json", b"[1]"),
        ("3.wav", sound(3)),
        ("3.txt", "späte Ode".encode("utf-16")),
        ("4.wav", sound(4)),
        ("4.txt", b"x" * (1 << 20) + b"x"),
        ("5.wav", sound(5)),
        ("5.json", b'{"uri": "mine", "size": "big", "shard": 3, "listing_uri": 4}'),
    )
    rows, said = listed(tmp_path / "a.tar")
    assert rows["1.wav"]["json"] == '{"a": 1, "a": 2}' and rows["2.wav"]["json"] == "[1]"
    assert rows["3.wav"]["caption"] == "späte Ode"
    assert "2 JSON sidecars that are no JSON object" in said and "1 sidecars in tar shards not read, over 1 MiB" in said
    assert {"mine", "big", 3, 4} <= {rows["5.wav"][name] for name in rows["5.wav"]}


def test_links_are_rows(tmp_path: Path) -> None:
    pack(
        tmp_path / "a.tar",
        ("a.wav", sound(1)),
        link("hard.wav", "a.wav", tarfile.LNKTYPE),
        link("soft.wav", "d/later.wav"),
        link("d/up.wav", "../a.wav"),
        link("chain.wav", "soft.wav"),
        ("d/later.wav", sound(2)),
        link("dangling.wav", "nowhere.wav"),
        link("outside.wav", "/etc/passwd"),
        link("self.wav", "self.wav"),
        link("one.wav", "two.wav"),
        link("two.wav", "one.wav"),
        link("pipe.wav", "", tarfile.FIFOTYPE),
        link("folder.wav", "", tarfile.DIRTYPE),
        ("hard.json", b'{"label": "x"}'),
    )
    rows, said = listed(tmp_path / "a.tar")
    good = {"a.wav": 1, "hard.wav": 1, "soft.wav": 2, "d/up.wav": 1, "chain.wav": 2, "d/later.wav": 2}
    bad = ["dangling.wav", "outside.wav", "self.wav", "one.wav", "two.wav", "pipe.wav"]
    assert set(rows) == {*good, *bad}
    for name, seed in good.items():
        assert content(tmp_path, rows[name]) == content(tmp_path, rows[name], by_offset=False) == sound(seed), name
    assert rows["hard.wav"]["label"] == "x" and rows["a.wav"]["label"] is None
    for name in bad:
        with pytest.raises(DecodeError, match=r"a link to|neither a file"):
            content(tmp_path, rows[name])
    assert "6 members of tar shards that cannot be read" in said


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_member_names(tmp_path: Path, format: int) -> None:
    long = "d" * 90 + "/" + "e" * 90 + "/" + "é" * 120 + ".wav"
    undecodable = b"caf\xe9.wav".decode("utf-8", "surrogateescape")
    names = [long, undecodable, "./dot.wav", "a#b.wav", "x.tar#y.wav", "http://h/a.wav", "/abs.wav", "sp ace.wav"]
    members = [(name, sound(number)) for number, name in enumerate(names)]
    pack(tmp_path / "a.tar", *members, (long[:-4] + ".cls", b"rain"), format=format)
    rows, _ = listed(tmp_path / "a.tar")
    assert list(rows)[1] == "caf\\xe9.wav" and rows[long]["label"] == "rain" and len(rows) == len(names)
    for number, row in enumerate(rows.values()):
        assert content(tmp_path, row) == content(tmp_path, row, by_offset=False) == sound(number)


def test_skip_lists_hold_in_tars(tmp_path: Path) -> None:
    names = [
        "a.wav",
        "__MACOSX/._a.wav",
        ".git/b.wav",
        "d/._c.wav",
        "Thumbs.db",
        "d/.DS_Store",
        "desktop.ini",
        "LICENSE",
    ]
    pack(tmp_path / "a.tar", *((name, sound()) for name in names))
    assert list(listed(tmp_path / "a.tar")[0]) == ["a.wav"]


def test_the_last_member_of_a_name_counts(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", ("a.wav", sound(1)), ("b.wav", sound(2)), ("a.wav", sound(3)), ("a.cls", b"x"))
    rows, said = listed(tmp_path / "a.tar")
    assert list(rows) == ["b.wav", "a.wav"] and content(tmp_path, rows["a.wav"]) == sound(3)
    assert "1 members of tar shards replaced by a later one" in said


def test_cut_and_damaged_tars_keep_their_whole_members(tmp_path: Path) -> None:
    members = [(f"{number}.wav", sound(number)) for number in range(5)]
    whole = pack(tmp_path / "a.tar", *members, ("0.json", b'{"label": "x"}')).read_bytes()
    block = 512 + -(-len(sound()) // 512) * 512
    for cut, count in ((2 * block + 700, 2), (2 * block + 100, 2), (2 * block + 512 + len(sound()) - 1, 2)):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        rows, said = listed(tmp_path / "a.tar")
        assert "a.tar" in rows and "tar shards that are damaged" in said
        for number in range(count):
            assert content(tmp_path, rows[f"{number}.wav"]) == sound(number)
        for name in set(rows) - {f"{number}.wav" for number in range(count)}:
            with pytest.raises(DecodeError, match=r"not a whole tar file|bytes are there"):
                content(tmp_path, rows[name])
    (tmp_path / "a.tar").write_bytes(whole[: 2 * block])  # between two members: nothing tells, but for the missing end
    rows, said = listed(tmp_path / "a.tar")
    assert list(rows) == ["0.wav", "1.wav"] and "without an end mark" in said
    (tmp_path / "a.tar").write_bytes(whole[: 2 * block] + b"\xff" * 512 + whole[2 * block + 512 :])  # one header lost
    rows, said = listed(tmp_path / "a.tar")
    assert set(rows) == {"0.wav", "1.wav", "3.wav", "4.wav", "a.tar"} and rows["0.wav"]["label"] == "x"


def test_joined_tars_are_read_to_their_end(tmp_path: Path) -> None:
    one = pack(tmp_path / "1", ("a.wav", sound(1))).read_bytes()
    two = pack(tmp_path / "2", ("b.wav", sound(2)), ("a.txt", b"a caption")).read_bytes()
    (tmp_path / "joined.tar").write_bytes(one + two + two[:0])
    rows, said = listed(tmp_path / "joined.tar")
    assert list(rows) == ["a.wav", "b.wav"] and rows["a.wav"]["caption"] == "a caption" and not said
    assert content(tmp_path, rows["b.wav"], by_offset=False) == sound(2)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_file_that_only_looks_like_a_member(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    root = str(tmp_path) if where == "local" else request.getfixturevalue("s3_bucket")
    put(root, "file.tar#in.wav", "b.wav")
    corpus = list_corpus(root)
    rows = pa.concat_tables(corpus.batches()).to_pylist()
    assert [row["uri"] for row in rows] == ["b.wav", "file.tar#in.wav"]
    source = open_source(corpus.root, "file.tar#in.wav")
    assert (source if isinstance(source, bytes) else Path(str(source)).read_bytes()) == sound(0)


def test_a_folder_that_looks_like_a_tar_before_a_real_one(tmp_path: Path) -> None:
    (tmp_path / "a.tar#dir").mkdir()
    pack(tmp_path / "a.tar#dir" / "b.TAR", ("x.wav", sound(3)))
    rows, _ = listed(tmp_path / "a.tar#dir" / "b.TAR")
    assert open_source(str(tmp_path), "a.tar#dir/b.TAR#x.wav") == sound(3) and len(rows) == 1


def test_a_tar_beside_sounds_says_what_to_do(tmp_path: Path) -> None:
    put(tmp_path, "a.wav")
    pack(tmp_path / "b.tar", ("x.wav", sound()))
    assert set(listed(tmp_path)[0]) == {"a.wav", "b.tar"}
    with pytest.raises(DecodeError, match="give tar shards as a corpus of their own"):
        open_source(str(tmp_path), "b.tar")
