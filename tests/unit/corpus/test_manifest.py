import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from audiomae import s3
from audiomae.artifacts.tables import EmbedSettings
from audiomae.corpus import folders, listings, sources
from audiomae.corpus.decode import decode
from audiomae.corpus.manifest import clip_id, list_corpus, open_source
from audiomae.corpus.side_by_side import read_side_by_side
from audiomae.embedding.decoding import decode_item
from audiomae.errors import DecodeError, ItemError, UserError
from audiomae.storage import to_path, write_bytes
from tests.faulty_s3 import every, faulty_s3

RATE = 16_000


def sound(seed: int = 0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).uniform(-0.5, 0.5, 800), RATE, format="WAV")
    return file.getvalue()


def put(root: Any, *uris: str) -> None:
    for number, uri in enumerate(uris):
        write_bytes(to_path(root) / uri, sound(number))


def read(src: object) -> list[dict[str, Any]]:
    tables = list(list_corpus(str(src)).batches())
    assert all(table.schema == tables[0].schema for table in tables)
    return pa.concat_tables(tables).to_pylist()


def uris(src: object) -> list[str]:
    return [row["uri"] for row in read(src)]


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    return f"{request.getfixturevalue('s3_bucket')}/some/prefix"


# --- ids --------------------------------------------------------------------------------------------------------------


def test_clip_id_is_stable_and_63_bits() -> None:
    assert clip_id("a/b.wav", 0.0, 5.0) == 0x565F941686F3271A  # indexes in use hold such ids: it never changes
    ids = {clip_id(f"{n}.wav", start / 10, window) for n in range(50) for start in range(20) for window in (0.0, 5.0)}
    assert len(ids) == 2000
    assert all(0 <= value < 2**63 for value in ids)


def test_clip_id_ignores_float_noise_in_times() -> None:
    assert clip_id("a.wav", 0.1 + 0.2, 5.0) == clip_id("a.wav", 0.3, 5.0)


# --- folders, globs, prefixes -----------------------------------------------------------------------------------------


def test_folder_lists_what_may_be_audio_in_byte_order(root: str) -> None:
    put(root, "b/2.wav", "b/1.FLAC", "b-1.ogg", "a/deep/er/x", "c.mp3", "a/text_in_disguise.wav")
    put(root, "LICENSES.md", "a/README", "listing.csv", ".hidden.wav", ".git/x.wav", "b/cover.jpg", "a/.b/y.wav")
    rows = read(root)
    expected = ["a/deep/er/x", "a/text_in_disguise.wav", "b-1.ogg", "b/1.FLAC", "b/2.wav", "c.mp3"]
    assert [row["uri"] for row in rows] == expected
    assert [row["label"] for row in rows] == ["a", "a", None, "b", "b", None]
    assert all(row["size"] == len(sound()) and row["content_id"] for row in rows)


def test_rows_open_and_decode(root: str) -> None:
    put(root, "a/1.wav", "a/2.wav")
    corpus = list_corpus(root)
    for number, uri in enumerate(uris(root)):
        expected = decode(sound(number), RATE)
        np.testing.assert_array_equal(decode(open_source(corpus.root, uri), RATE), expected)


def test_flat_folder_has_no_label(root: str) -> None:
    put(root, "1.wav", "2.wav")
    assert set(read(root)[0]) == {"uri", "size", "content_id"}


def test_globs(root: str) -> None:
    put(root, "a/1.wav", "a/2.ogg", "b/1.wav", "b/c/3.wav", "top.wav")
    assert uris(f"{root}/*/*.wav") == ["a/1.wav", "b/1.wav"]
    assert uris(f"{root}/**/*.wav") == ["a/1.wav", "b/1.wav", "b/c/3.wav", "top.wav"]
    assert uris(f"{root}/[a]/?.*") == ["a/1.wav", "a/2.ogg"]
    assert uris(f"{root}/b/**") == ["1.wav", "c/3.wav"]
    assert list_corpus(f"{root}/b/*.wav").root == f"{root}/b"


def test_one_file(root: str) -> None:
    put(root, "a/1.wav")
    assert uris(f"{root}/a/1.wav") == ["1.wav"]


def test_folder_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    put(tmp_path / "[takes]*", "1.wav")
    assert uris(tmp_path / "[takes]*") == ["1.wav"]


def test_relative_paths_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "sounds", "1.wav")
    monkeypatch.chdir(tmp_path)
    corpus = list_corpus("sounds/")
    assert corpus.root == str(tmp_path / "sounds")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert uris("~/sounds") == ["1.wav"]


def test_what_is_no_file_is_a_row_and_not_a_hole(tmp_path: Path) -> None:
    put(tmp_path, "a/1.wav")
    (tmp_path / "empty_folder.wav").mkdir()
    (tmp_path / "recordings.wav").mkdir()
    put(tmp_path, "recordings.wav/inside.wav")
    (tmp_path / "broken.wav").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.wav")
    rows = {row["uri"]: row["size"] for row in read(tmp_path)}
    good = len(sound())
    expected = {
        "a/1.wav": good,
        "broken.wav": -1,
        "empty_folder.wav/": -1,
        "pipe.wav": -1,
        "recordings.wav/inside.wav": good,
    }
    assert rows == expected
    for uri in ("broken.wav", "empty_folder.wav/", "pipe.wav"):
        with pytest.raises(DecodeError):
            decode(open_source(str(tmp_path), uri), RATE)


def test_folder_that_cannot_be_entered_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "open/1.wav", "shut/2.wav")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).rstrip("/").endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(folders.os, "scandir", scandir)
    assert uris(tmp_path) == ["open/1.wav", "shut/"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    put(tmp_path / "corpus", "a/1.wav")
    put(tmp_path / "elsewhere", "2.wav")
    (tmp_path / "corpus" / "a" / "up").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    assert uris(tmp_path / "corpus") == ["a/1.wav", "linked/2.wav"]


def test_links_that_lead_to_themselves_are_rows_that_fail(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", "d/b.wav")
    for link, target in (
        ("self.wav", "self.wav"),
        ("d/one.wav", "two.wav"),
        ("d/two.wav", "one.wav"),
        ("self", "self"),
    ):
        (tmp_path / link).symlink_to(target)
    rows = {row["uri"]: row["size"] for row in read(tmp_path)}
    good = len(sound())
    assert rows == {"a.wav": good, "d/b.wav": good, "d/one.wav": -1, "d/two.wav": -1, "self": -1, "self.wav": -1}
    settings = EmbedSettings(fingerprint="f", dim=4, sample_rate=RATE, mode="windows", window_s=1, hop_s=1)
    for uri in (uri for uri, size in rows.items() if size < 0):
        with pytest.raises(ItemError, match="symbolic link") as caught:
            list(decode_item({"uri": uri}, str(tmp_path), settings))
        assert not caught.value.passing


def test_skip_lists_hold_for_every_name(root: str) -> None:
    put(
        root, "a.wav", "Thumbs.db", "d/Thumbs.db", "d/THUMBS.DB", "d/.DS_Store", "d/._x.wav", "d/desktop.ini", "d/b.wav"
    )
    put(root, "__MACOSX/x.wav", "d/@eaDir/x.wav", "d/.hidden/x.wav", "$RECYCLE.BIN/x.wav", "d/_SUCCESS", "d/LICENSE")
    corpus = list_corpus(root)
    names = [uri for table in corpus.batches() for uri in table["uri"].to_pylist()]
    assert names == ["a.wav", "d/b.wav"]
    assert "files passed over by their names" in "\n".join(corpus.notes.lines())


def test_keys_that_would_not_be_relative(s3_bucket: str) -> None:
    put(f"{s3_bucket}/x", "a.wav")
    bucket = s3_bucket.removeprefix("s3://")
    keys = ["x//double.wav", "x/file:/b.wav", "x/http://c.wav", "x/d//e.wav", "x/./f.wav", "x/g?#*[.wav"]
    for number, key in enumerate(keys):
        s3.client().put_object(Bucket=bucket, Key=key, Body=sound(number))
    corpus = list_corpus(f"{s3_bucket}/x")
    rows = pa.concat_tables(corpus.batches()).to_pylist()
    assert len(rows) == len(keys) + 1
    for row in rows:
        assert isinstance(open_source(corpus.root, row["uri"]), bytes)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    raw = os.path.join(os.fsencode(tmp_path), b"caf\xe9.wav")
    with open(raw, "wb") as file:  # noqa: PTH123 (a name that pathlib prints but cannot spell)
        file.write(sound())
    put(tmp_path, "Ångström 日本.wav")
    assert uris(tmp_path) == ["caf\\xe9.wav", "Ångström 日本.wav"]
    for uri in uris(tmp_path):
        assert len(decode(open_source(str(tmp_path), uri), RATE)) == 800


def test_large_folder_streams_in_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2500):
        (tmp_path / f"{number}.wav").touch()
    monkeypatch.setattr(folders, "TABLE_ROWS", 1000)
    tables = list(list_corpus(str(tmp_path)).batches())
    assert [table.num_rows for table in tables] == [1000, 1000, 500]
    names = [uri for table in tables for uri in table["uri"].to_pylist()]
    assert names == sorted(f"{number}.wav" for number in range(2500))


def test_s3_listing_pages(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "S3_PAGE_KEYS", 4)
    put(f"{s3_bucket}/x", *(f"{number:04d}.wav" for number in range(10)))
    bucket = s3_bucket.removeprefix("s3://")
    s3.client().put_object(Bucket=bucket, Key="x/folder_marker/", Body=b"")
    assert uris(f"{s3_bucket}/x") == [f"{number:04d}.wav" for number in range(10)]


def test_large_folders_of_a_store_are_listed_side_by_side(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "S3_PAGE_KEYS", 8)
    names = [f"{folder}/{number:02d}.wav" for folder in ("a", "b", "b-c", "d") for number in range(11)]
    names += ["b-.wav", "b.wav", "zz.wav", "d/e/f.wav", "a.wav"]
    client, bucket = s3.client(), s3_bucket.removeprefix("s3://")
    for name in names:
        client.put_object(Bucket=bucket, Key=f"x/{name}", Body=b"")
    read_by: list[Any] = []
    real = folders._unit_pages
    monkeypatch.setattr(folders, "_unit_pages", lambda *unit: read_by.append(unit[-1]) or real(*unit))
    assert uris(f"{s3_bucket}/x") == sorted(names)
    assert {unit for unit in read_by if isinstance(unit, str)} == {"x/a/", "x/b/", "x/b-c/", "x/d/"}


def test_reading_side_by_side_keeps_order_passes_errors_on_and_can_be_left() -> None:
    def read(unit: int) -> Any:
        if unit == 40:
            raise UserError("no such unit")
        yield from (unit * 100 + page for page in range(unit % 9))

    expected = [unit * 100 + page for unit in range(40) for page in range(unit % 9)]
    assert list(read_side_by_side(range(40), read)) == expected
    with pytest.raises(UserError, match="no such unit"):
        list(read_side_by_side(range(50), read))
    assert next(read_side_by_side(range(1, 1000), read)) == 100


def test_content_id_changes_with_the_content(root: str) -> None:
    put(root, "a.wav", "b.wav")
    before = {row["uri"]: row["content_id"] for row in read(root)}
    write_bytes(to_path(root) / "a.wav", sound(7) + b"\0\0")
    after = {row["uri"]: row["content_id"] for row in read(root)}
    assert before["a.wav"] != after["a.wav"] and before["b.wav"] == after["b.wav"]


# --- listings ---------------------------------------------------------------------------------------------------------


def listing(root: str, name: str, text: str) -> str:
    write_bytes(to_path(root) / name, text.encode())
    return f"{root}/{name}"


def test_csv_carries_columns_with_the_type_that_fits_all_rows(root: str) -> None:
    put(root, "a/1.wav", "2.wav", "3.wav")
    text = 'uri,label,fold,score,code\na/1.wav,"rain, heavy",1,2,007\n2.wav,"two\nlines",2,0.5,12\n3.wav,,3,,13\n'
    rows = read(listing(root, "list.csv", text))
    assert [row["uri"] for row in rows] == ["a/1.wav", "2.wav", "3.wav"]
    assert [row["label"] for row in rows] == ["rain, heavy", "two\nlines", None]
    assert [row["fold"] for row in rows] == [1, 2, 3]
    assert [row["score"] for row in rows] == [2.0, 0.5, None]
    assert [row["code"] for row in rows] == ["007", "12", "13"]
    assert all(row["size"] == len(sound()) for row in rows)


def test_csv_type_is_that_of_the_whole_file(tmp_path: Path) -> None:
    lines = [f"{number}.wav,{number}" for number in range(200_000)] + ["x.wav,many"]
    path = tmp_path / "list.csv"
    path.write_text("uri,size,content_id,count\n" + "\n".join(line.replace(",", ",1,c,") for line in lines) + "\n")
    tables = list(list_corpus(str(path)).batches())
    assert sum(table.num_rows for table in tables) == 200_001
    assert max(table.num_rows for table in tables) <= listings.TABLE_ROWS
    assert {table.schema.field("count").type for table in tables} == {pa.string()}


def test_jsonl_columns_and_types_may_vary_from_line_to_line(root: str) -> None:
    put(root, "1.wav", "2.wav", "3.wav")
    rows = [
        {"uri": "1.wav", "fold": 1, "tags": ["a", "b"], "mixed": 3},
        {"uri": "2.wav", "fold": 2.5, "mixed": "three", "flag": True},
        {"uri": "3.wav", "caption": "späte Ode", "fold": None},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    got = read(listing(root, "list.jsonl", text))
    assert [row["fold"] for row in got] == [1.0, 2.5, None]
    assert [row["mixed"] for row in got] == ["3", "three", None]
    assert [row["flag"] for row in got] == [None, True, None]
    assert json.loads(got[0]["tags"]) == ["a", "b"]
    assert got[2]["caption"] == "späte Ode"


def test_jsonl_one_schema_over_many_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "TABLE_ROWS", 2)
    lines = [{"uri": "1", "a": 1}, {"uri": "2", "a": 2}, {"uri": "3", "a": 0.5, "late": "x"}, {"uri": "4"}]
    path = listing(str(tmp_path), "list.jsonl", "\n".join(map(json.dumps, lines)))
    assert [(row["a"], row["late"]) for row in read(path)] == [(1.0, None), (2.0, None), (0.5, "x"), (None, None)]


def test_parquet(root: str) -> None:
    put(root, "1.wav", "2.wav")
    file = io.BytesIO()
    pq.write_table(pa.table({"label": ["x", "y"], "uri": ["1.wav", "2.wav"], "n": pa.array([1, 2], pa.int16())}), file)
    write_bytes(to_path(root) / "list.parquet", file.getvalue())
    rows = read(f"{root}/list.parquet")
    assert [(row["uri"], row["label"], row["n"]) for row in rows] == [("1.wav", "x", 1), ("2.wav", "y", 2)]


def test_listing_may_name_files_anywhere(tmp_path: Path, s3_bucket: str) -> None:
    put(tmp_path / "far", "1.wav")
    put(s3_bucket, "2.wav")
    path = listing(str(tmp_path / "near"), "list.csv", f"uri\n{tmp_path}/far/1.wav\n{s3_bucket}/2.wav\nabsent.wav\n")
    corpus = list_corpus(path)
    rows = read(path)
    assert [row["size"] for row in rows] == [len(sound()), len(sound()), -1]
    for row in rows[:2]:
        assert len(decode(open_source(corpus.root, row["uri"]), RATE)) == 800
    with pytest.raises(DecodeError, match="NotFound"):
        decode(open_source(corpus.root, "absent.wav"), RATE)


def test_listing_s_own_sizes_are_taken(tmp_path: Path) -> None:
    path = listing(str(tmp_path), "list.csv", "uri,size,content_id\na.wav,5,x\n")
    expected = {"uri": "a.wav", "size": 5, "content_id": "x", "listing_size": 5, "listing_content_id": "x"}
    assert read(path) == [expected]


def test_names_of_the_embedding_table_are_set_aside(tmp_path: Path) -> None:
    path = listing(str(tmp_path), "list.csv", "id,uri,start_s\n9,a.wav,1\n")
    (row,) = read(path)
    assert (row["listing_id"], row["listing_start_s"]) == (9, 1) and "id" not in row


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.csv", "path,label\na.wav,x\n", "no column 'uri' among"),
        ("a.csv", "uri,label\na.wav,x\n,y\n", "has no uri"),
        ("a.csv", "uri,label\na.wav,x\nb.wav,y\na.wav,z\n", "repeat the uri"),
        ("a.csv", "uri,label\na.wav,x,surplus\n", "not a readable CSV"),
        ("a.csv", "", "not a readable CSV"),
        ("a.csv", "uri,label\n", "is empty"),
        ("a.jsonl", '{"uri": "a.wav"}\nnot json\n', "line 2: not JSON"),
        ("a.jsonl", '["a.wav"]\n', "expected an object"),
        ("a.jsonl", '{"uri": "a.wav"}\n{"file": "b.wav"}\n', "has no uri"),
        ("a.jsonl", "", "is empty"),
        ("a.parquet", "not parquet", "not a readable Parquet"),
    ],
)
def test_listings_that_cannot_be_used(tmp_path: Path, name: str, text: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        read(listing(str(tmp_path), name, text))


# --- tar shards -------------------------------------------------------------------------------------------------------


def tar(path: Any, members: list[tuple[str, bytes]]) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    write_bytes(path, file.getvalue())


def shards(root: str) -> None:
    tar(
        to_path(root) / "train-000.tar",
        [
            ("000.wav", sound(0)),
            ("000.json", b'{"label": "rain", "speed": 3, "id": 5}'),
            ("d/001.json", b'{"speed": 1.5}'),
            ("d/001.cls", b"7\n"),
            ("d/001.txt", b"a caption"),
            ("d/001.wav", sound(1)),
            ("002.json", b'{"label": "no sound here"}'),
        ],
    )
    tar(to_path(root) / "train-001.tar", [("000.wav", sound(2)), ("000.left.wav", sound(3))])


def test_tar_shards(root: str) -> None:
    shards(root)
    for source in (f"{root}/train-*.tar", root):
        rows = read(source)
        assert [row["uri"] for row in rows] == [
            "train-000.tar#000.wav",
            "train-000.tar#d/001.wav",
            "train-001.tar#000.wav",
            "train-001.tar#000.left.wav",
        ]
        assert [row["label"] for row in rows] == ["rain", "7", None, None]
        assert [row["speed"] for row in rows] == [3.0, 1.5, None, None]
        assert [row["caption"] for row in rows] == [None, "a caption", None, None]
        assert rows[0]["listing_id"] == 5
    for number, row in enumerate(rows):
        expected = decode(sound(number), RATE)
        np.testing.assert_array_equal(decode(open_source(root, row["uri"]), RATE), expected)
        by_offset = open_source(root, row["uri"], row["tar_offset"], row["size"])
        np.testing.assert_array_equal(decode(by_offset, RATE), expected)


def test_one_tar(root: str) -> None:
    shards(root)
    assert uris(f"{root}/train-001.tar") == ["train-001.tar#000.wav", "train-001.tar#000.left.wav"]


def test_broken_shard_keeps_what_can_be_read_and_is_a_row_itself(tmp_path: Path) -> None:
    shards(str(tmp_path))
    whole = (tmp_path / "train-000.tar").read_bytes()
    (tmp_path / "train-000.tar").write_bytes(whole[:4096])
    (tmp_path / "train-002.tar").write_bytes(b"not a tar at all" * 100)
    names = uris(f"{tmp_path}/*.tar")
    assert "train-000.tar" in names and "train-002.tar" in names and "train-001.tar#000.wav" in names
    with pytest.raises(DecodeError):
        decode(open_source(str(tmp_path), "train-002.tar"), RATE)
    with pytest.raises(DecodeError, match="no member"):
        open_source(str(tmp_path), "train-001.tar#absent.wav")


def test_packed_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(UserError, match=r"decompress them to \.tar"):
        list_corpus(str(tmp_path / "a.tar.gz"))


def test_large_members_and_objects_are_read_in_ranges(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "WHOLE_BYTES", 500)
    monkeypatch.setattr(s3, "RANGE_BYTES", 300)
    shards(root)
    put(root, "plain.wav")
    source = open_source(root, "train-001.tar#000.left.wav")
    assert not isinstance(source, bytes | Path)
    np.testing.assert_array_equal(decode(source, RATE), decode(sound(3), RATE))
    np.testing.assert_array_equal(decode(open_source(root, "plain.wav"), RATE), decode(sound(0), RATE))


# --- missing, empty, faulty -------------------------------------------------------------------------------------------


def test_missing_and_empty(root: str) -> None:
    with pytest.raises(UserError, match=r"does not exist; expected a folder, a glob"):
        list_corpus(f"{root}/nowhere")
    put(root, "notes.txt")
    with pytest.raises(UserError, match="is empty"):
        list_corpus(root)
    with pytest.raises(UserError, match="is empty"):
        list_corpus(f"{root}/*.wav")


def test_no_such_bucket(s3_server: str) -> None:
    with pytest.raises(UserError, match="no such bucket"):
        list_corpus("s3://there-is-no-such-bucket/x")
    with pytest.raises(DecodeError, match="NotFound"):
        open_source("s3://there-is-no-such-bucket", "a.wav")


class FlakyClient:
    """Breaks off the body, or refuses, for the first few requests."""

    def __init__(self, client: Any, faults: list[str]) -> None:
        self._client, self._faults = client, faults

    def get_object(self, **request: Any) -> dict[str, Any]:
        import botocore.exceptions

        fault = self._faults.pop(0) if self._faults else ""
        if fault == "denied":
            raise botocore.exceptions.ClientError({"Error": {"Code": "AccessDenied"}}, "GetObject")
        reply: dict[str, Any] = self._client.get_object(**request)
        if fault == "short":
            reply["Body"] = io.BytesIO(reply["Body"].read()[:-5])
        elif fault == "dropped":

            class Body:
                def read(self) -> bytes:
                    raise botocore.exceptions.ResponseStreamingError(error="reset")

            reply["Body"] = Body()
        return reply


def test_body_that_breaks_off_is_asked_for_again(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(s3_bucket, "a.wav")
    monkeypatch.setattr("time.sleep", lambda _: None)
    client = FlakyClient(s3.client(), ["short", "dropped", "short"])
    monkeypatch.setattr(s3, "client", lambda: client)
    assert open_source(s3_bucket, "a.wav") == sound()
    client._faults[:] = ["dropped"] * s3.BODY_ATTEMPTS
    with pytest.raises(DecodeError, match="ReadFailed"):
        open_source(s3_bucket, "a.wav")
    client._faults[:] = ["denied"]
    with pytest.raises(DecodeError, match="PermissionDenied"):
        open_source(s3_bucket, "a.wav")


def test_empty_object(s3_bucket: str) -> None:
    write_bytes(to_path(s3_bucket) / "empty.wav", b"")
    with pytest.raises(DecodeError, match="EmptyFile"):
        decode(open_source(s3_bucket, "empty.wav"), RATE)
    assert read(s3_bucket)[0]["size"] == 0


def test_decode_takes_an_s3_uri(s3_bucket: str) -> None:
    put(s3_bucket, "a.wav")
    np.testing.assert_array_equal(decode(f"{s3_bucket}/a.wav", RATE), decode(sound(), RATE))


def test_faults_of_the_server_are_survived(s3_bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(f"{s3_bucket}/x", *(f"{number}.wav" for number in range(12)))
    monkeypatch.setattr(folders, "S3_PAGE_KEYS", 3)
    monkeypatch.setattr("time.sleep", lambda _: None)  # of the backoff
    with faulty_s3(s3_server, every(4)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        corpus = list_corpus(f"{s3_bucket}/x")
        rows = pa.concat_tables(corpus.batches()).to_pylist()
        assert len(rows) == 12
        for row in rows:
            expected = sound(int(row["uri"].removesuffix(".wav")))
            assert open_source(corpus.root, row["uri"]) == expected
        assert sum(proxy.injected.values()) >= 6 and len(proxy.injected) == 4


def test_server_that_never_recovers_is_a_reason(
    s3_bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_bucket, "a.wav")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with faulty_s3(s3_server, every(1, ("503",))) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(DecodeError, match="ReadFailed"):
            open_source(s3_bucket, "a.wav")
        with pytest.raises(UserError, match="cannot be listed"):
            list_corpus(f"{s3_bucket}/*.wav")
        assert proxy.injected["503"] >= 10
