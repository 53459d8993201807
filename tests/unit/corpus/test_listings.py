"""Listings keep their values: what a cell, a number, a name or a path in one becomes, and what is said of it."""

import io
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from audiomae.corpus import listings
from audiomae.corpus.likeness import look_alikes
from audiomae.corpus.manifest import ReadAs, list_corpus, open_source
from audiomae.errors import ConfigError, DecodeError, ListingError
from tests.unit.corpus.test_manifest import put, sound

NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def write(folder: Path, name: str, text: str | bytes) -> str:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder / name)


def rows_of(src: object, **read_as: Any) -> list[dict[str, Any]]:
    tables = list(list_corpus(str(src), ReadAs(**read_as)).batches())
    assert all(table.schema == tables[0].schema for table in tables)
    return pa.concat_tables(tables).to_pylist()


def notes_of(src: object, **read_as: Any) -> str:
    corpus = list_corpus(str(src), ReadAs(**read_as))
    list(corpus.batches())
    return "\n".join(corpus.notes.lines())


def csv_values(folder: Path, *cells: str, **read_as: Any) -> list[Any]:
    lines = [f"{number}.wav,{cell}" for number, cell in enumerate(cells)]
    path = write(folder, "list.csv", "\n".join(["uri,value", *lines]) + "\n")
    return [row["value"] for row in rows_of(path, **read_as)]


# --- values of a CSV --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cells",
    [
        ("1.10", "1.1", "12e3"),
        ("1.10", "1.20"),
        ("12e3", "1e5"),
        ("1E5", "2"),
        ("007", "12"),
        ("+5", "6"),
        ("-0", "0"),
        (".5", "0.25"),
        ("5.", "0.25"),
        ("1", "1.0"),
        ("12345678901234567890", "1"),
        ("9223372036854775808", "1"),
        ("9007199254740993", "0.5"),
        ("0.12345678901234567890123", "0.5"),
        ("1e400", "1.5"),
        ("0x10", "1"),
        ("1_000", "1"),
        ("NA", "null"),
        ("nan", "inf"),
        ("nan", "1.5"),
        ("true", "false"),
        ("2024-01-01", "2024-01-02"),
        ("1/2", "3/4"),
        ("10:30", "11:45"),
        (" 1", "2"),
    ],
)
def test_text_stays_text_where_a_number_would_lose_something(tmp_path: Path, cells: tuple[str, ...]) -> None:
    assert csv_values(tmp_path, *cells) == list(cells)


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (("1", "-2", "0"), [1, -2, 0]),
        (("9223372036854775807", "9007199254740993"), [9223372036854775807, 9007199254740993]),
        (("0.5", "2", "-1.25"), [0.5, 2.0, -1.25]),
        (("1.0", "2.0"), [1.0, 2.0]),
        (("0.8444218515250481", "1e-05", "0.1"), [0.8444218515250481, 1e-05, 0.1]),
        (("1", "", "3"), [1, None, 3]),
        (('"quoted ""one"""', '"a,b"', '"two\nlines"'), ['quoted "one"', "a,b", "two\nlines"]),
        (('""', "x", ""), ["", "x", None]),
    ],
)
def test_numbers_and_quotes(tmp_path: Path, cells: tuple[str, ...], values: list[Any]) -> None:
    assert csv_values(tmp_path, *cells) == values
    assert [type(value) for value in csv_values(tmp_path, *cells)] == [type(value) for value in values]


def test_a_number_of_two_spellings_late_in_the_file_keeps_the_column_text(tmp_path: Path) -> None:
    cells = ["0.5"] * 9_000 + ["0.50"]
    assert csv_values(tmp_path, *cells) == cells
    said = notes_of(tmp_path / "list.csv")
    assert "1 columns of numbers kept as text" in said and "value: 0.50" in said


def test_null_words_are_values_unless_declared(tmp_path: Path) -> None:
    words = ("NA", "null", "nan", "None", '"NA"', "x")
    path = tmp_path / "list.csv"
    assert csv_values(tmp_path, *words) == ["NA", "null", "nan", "None", "NA", "x"]
    said = notes_of(path)
    assert "4 unquoted words that may mean missing" in said and "value: NA" in said
    assert csv_values(tmp_path, *words, null_words="NA,null") == [None, None, "nan", "None", "NA", "x"]
    assert csv_values(tmp_path, "1", "NA", null_words="NA") == [1, None]
    assert "missing" not in notes_of(path, types={"value": "text"}, null_words="NA")
    assert csv_values(tmp_path, '"NA"', '"null"') == ["NA", "null"]
    assert not notes_of(path)


def test_declared_types(tmp_path: Path) -> None:
    assert csv_values(tmp_path, "007", "12", types="value=int") == [7, 12]
    assert csv_values(tmp_path, "1.10", "12e3", types={"value": "float"}) == [1.1, 12000.0]
    assert csv_values(tmp_path, "1", "2", types="value=text") == ["1", "2"]
    assert csv_values(tmp_path, "true", "False", types="value=bool") == [True, False]
    assert str(csv_values(tmp_path, "2024-02-29", types="value=date")[0]) == "2024-02-29"
    with pytest.raises(ListingError, match="column 'value' is declared int, but 'x' is none"):
        csv_values(tmp_path, "1", "x", types="value=int")
    with pytest.raises(ConfigError, match="no column 'vlaue'; did you mean 'value'"):
        csv_values(tmp_path, "1", types="vlaue=int")
    with pytest.raises(ValueError, match="COLUMN=TYPE"):
        ReadAs(types="label")


def test_encodings_and_separators(tmp_path: Path) -> None:
    text = "uri,label\na.wav,é\n"
    assert rows_of(write(tmp_path, "bom.csv", text.encode("utf-8-sig")))[0]["label"] == "é"
    assert rows_of(write(tmp_path, "crlf.csv", text.replace("\n", "\r\n")))[0]["label"] == "é"
    assert rows_of(write(tmp_path, "a.tsv", text.replace(",", "\t")))[0]["label"] == "é"
    for name, data, match in [
        ("u16.csv", text.encode("utf-16"), "UTF-16"),
        ("u16le.csv", text.encode("utf-16-le"), "UTF-16"),
        ("u32.csv", text.encode("utf-32"), "UTF-32"),
        ("u16.jsonl", '{"uri": "a.wav"}\n'.encode("utf-16"), "UTF-16"),
        ("latin.csv", text.encode("latin-1"), "expected UTF-8"),
        ("latin.jsonl", '{"uri": "é.wav"}\n'.encode("latin-1"), "line 1: not JSON"),
        ("semi.csv", text.replace(",", ";").encode(), "separated by semicolons"),
        ("tabs.csv", text.replace(",", "\t").encode(), "separated by tabs.*expected commas; name it .tsv"),
        ("pipe.csv", text.replace(",", "|").encode(), "separated by vertical bars"),
        ("commas.tsv", text.encode(), "separated by commas.*expected tabs"),
        ("twice.csv", b"uri,label,label\na.wav,dog,x\n", "column 'label' comes twice"),
        ("twice.jsonl", b'{"uri": "a.wav", "label": 1, "label": 2}\n', "the key 'label' comes twice"),
        ("quote.csv", b'uri,label\na.wav,"dog\nb.wav,cat\n', "never closed"),
        ("short.csv", b"uri,label\na.wav\n", "Expected 2 columns, got 1"),
        ("packed.csv.gz", b"\x1f\x8b", "decompress"),
    ]:
        with pytest.raises(ListingError, match=match) as caught:
            rows_of(write(tmp_path, name, data))
        assert caught.value.exit_status == 2


# --- columns whose names are ours -------------------------------------------------------------------------------------


def test_no_column_is_lost_to_a_name_of_ours(tmp_path: Path) -> None:
    names = ["id", "start_s", "end_s", "embedding", "size", "content_id", "tar_offset", "segment_start_s", "shard"]
    names += ["corpus", "kind", "listing_id", ""]
    path = write(tmp_path, "list.csv", ",".join(["uri", *names]) + "\na.wav," + ",".join(f"v{n}" for n in names) + "\n")
    (row,) = rows_of(path)
    assert row["uri"] == "a.wav" and row["size"] == -1
    values = {value for name, value in row.items() if name not in ("uri", "size", "content_id")}
    assert values >= {f"v{name}" for name in names if name != "content_id"}
    assert row["kind"] == "vkind" and row["listing_size"] == "vsize" and row["listing_id"] == "vlisting_id"
    assert row["listing_id_2"] == "vid" and row["column_14"] == "v"


def test_a_size_that_is_no_number_of_bytes_is_only_a_column(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", "b.wav")
    for sizes in (("large", "small"), ("1.5", "2.5"), ("-1", "5")):
        text = "uri,size\n" + "".join(f"{uri}.wav,{size}\n" for uri, size in zip("ab", sizes, strict=True))
        rows = rows_of(write(tmp_path, "list.csv", text))
        assert [row["size"] for row in rows] == [len(sound())] * 2
        assert [str(row["listing_size"]) for row in rows] == list(sizes)


def test_what_the_listing_leaves_out_is_looked_up(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", "b.wav")
    rows = rows_of(write(tmp_path, "list.csv", "uri,size,etag\na.wav,5,x\nb.wav,,\n"))
    assert [(row["size"], row["content_id"] == "x") for row in rows] == [(5, True), (len(sound()), False)]
    rows = rows_of(write(tmp_path, "list.csv", "uri,size\na.wav,5\n"))
    assert rows[0]["size"] == len(sound()) and rows[0]["listing_size"] == 5


def test_sizes_of_objects_cost_no_request(s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "entry_of", lambda *_: pytest.fail("looked up"))
    path = write(tmp_path, "list.csv", f"uri,size\n{s3_bucket}/a.wav,5\n{s3_bucket}/b.wav,6\n")
    assert [(row["size"], row["content_id"]) for row in rows_of(path)] == [(5, "size-5"), (6, "size-6")]


# --- JSONL ------------------------------------------------------------------------------------------------------------


def test_json_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "TABLE_ROWS", 1)  # every line in a table of its own: types meet only at the end
    columns: dict[str, tuple[list[str], list[Any]]] = {
        "int": (["1", "9223372036854775807"], [1, 9223372036854775807]),
        "float": (["1", "0.5"], [1.0, 0.5]),
        "exact": (["9007199254740993", "0.5"], ["9007199254740993", "0.5"]),
        "long": (["12345678901234567890", "1"], ["12345678901234567890", "1"]),
        "digits": (["0.12345678901234567890123", "1"], ["0.12345678901234567890123", "1"]),
        "huge": (["1e400", "1"], ["1e400", "1"]),
        "mixed": (["3", '"three"'], ["3", "three"]),
        "words": (['"NA"', '"null"'], ["NA", "null"]),
        "bools": (["true", "null"], [True, None]),
        "boolish": (["true", "1"], ["true", "1"]),
        "float_text": (["2.0", '"x"'], ["2.0", "x"]),
        "nested": (['{"a": [1, "é"]}', "null"], ['{"a": [1, "é"]}', None]),
        "text_number": (['"1.10"', '"1.1"'], ["1.10", "1.1"]),
        "nothing": (["null", "null"], [None, None]),
    }
    lines = [
        "{"
        + f'"uri": "{row}.wav", '
        + ", ".join(f'"{name}": {cells[row]}' for name, (cells, _) in columns.items())
        + "}"
        for row in range(2)
    ]
    path = write(tmp_path, "list.jsonl", "\ufeff" + "\r\n\n".join(lines))
    got = rows_of(path)
    for name, (_, values) in columns.items():
        assert [row[name] for row in got] == values, name
        assert [type(row[name]) for row in got] == [type(value) for value in values], name
    assert "columns of mixed kinds" in notes_of(path)
    assert [row["int"] for row in rows_of(path, types="int=text")] == ["1", "9223372036854775807"]


def test_json_names_that_python_made_of_bytes(tmp_path: Path) -> None:
    raw = os.path.join(os.fsencode(tmp_path), b"caf\xe9.wav")
    with open(raw, "wb") as file:  # noqa: PTH123 (a name that pathlib prints but cannot spell)
        file.write(sound())
    path = write(tmp_path, "list.jsonl", json.dumps({"uri": os.fsdecode(b"caf\xe9.wav")}))
    (row,) = rows_of(path)
    assert row["uri"] == "caf\\xe9.wav" and row["size"] == len(sound())


# --- Parquet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
        (pa.array(["a", None], pa.string_view()), ["a", None]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array([7, 8]).dictionary_encode(), [7, 8]),
        (pa.array([b"a", b"b"], pa.binary()), ["a", "b"]),
        (pa.array([b"a", b"\xff"], pa.large_binary()), ["a", "\\xff"]),
        (pa.array([b"a", b"b"], pa.binary_view()), ["a", "b"]),
        (pa.array([b"ab", b"\x00\xff"], pa.binary(2)), ["6162", "00ff"]),
        (pa.array([None, None], pa.null()), [None, None]),
        (pa.array([1, 2], pa.uint8()), [1, 2]),
        (pa.array([1.5, 2], pa.float16()), [1.5, 2.0]),
        (pa.array(["1.10", "2.00"]).cast(pa.decimal128(5, 2)), ["1.10", "2.00"]),
        (pa.array([[1], [2, 3]]), [[1], [2, 3]]),
    ],
)
def test_parquet_types(tmp_path: Path, values: pa.Array, expected: list[Any]) -> None:
    uris = pa.array(["a.wav", "b.wav"], values.type if values.type in (pa.large_string(), pa.string_view()) else None)
    pq.write_table(pa.table({"uri": uris, "value": values}), tmp_path / "list.parquet")
    tables = list(list_corpus(str(tmp_path / "list.parquet")).batches())
    assert tables[0]["value"].to_pylist() == expected and tables[0].schema.field("uri").type == pa.string()


def test_parquet_of_binary_or_dictionary_uris(tmp_path: Path) -> None:
    for uris in (pa.array([b"a.wav", b"b.wav"]), pa.array(["a.wav", "b.wav"]).dictionary_encode()):
        pq.write_table(pa.table({"uri": uris}), tmp_path / "list.parquet")
        assert [row["uri"] for row in rows_of(tmp_path / "list.parquet")] == ["a.wav", "b.wav"]


def test_parquet_with_a_column_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a.wav"]), pa.array([1]), pa.array([2])], names=["uri", "label", "label"])
    pq.write_table(table, tmp_path / "list.parquet")
    with pytest.raises(ListingError, match="'label' comes twice"):
        rows_of(tmp_path / "list.parquet")


# --- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["s p.wav", "a#b.wav", "q?.wav", "star*.wav", "[x].wav", "100%.wav", "é.wav", "a&b;c=d.wav", "plus+.wav"]
)
def test_file_uris_and_odd_names(tmp_path: Path, name: str) -> None:
    put(tmp_path, f"dir/{name}")
    listed = [(tmp_path / "dir" / name).as_uri(), f"dir/{name}", f"file://{tmp_path}/dir/{name}"]
    for uri in listed:
        file = io.StringIO()
        path = write(tmp_path, "list.jsonl", json.dumps({"uri": uri}))
        corpus = list_corpus(path)
        (row,) = pa.concat_tables(corpus.batches()).to_pylist()
        assert row["size"] == len(sound()), uri
        assert Path(str(open_source(corpus.root, row["uri"]))).read_bytes() == sound()
        file.close()
    assert [row["uri"] for row in rows_of(tmp_path / "dir")] == [name]
    assert [row["uri"] for row in rows_of(tmp_path / "dir" / name)] == [name]
    assert rows_of((tmp_path / "dir").as_uri())[0]["uri"] == name


def test_schemes_that_are_not_read_say_so() -> None:
    with pytest.raises(DecodeError, match="https:// is not read; expected a path, file:// or s3://"):
        open_source("/root", "https://host/a.wav")


def test_globs_below_folders_that_look_like_globs(tmp_path: Path) -> None:
    put(tmp_path / "[takes]", "1.wav", "2.ogg")
    assert [row["uri"] for row in rows_of(tmp_path / "[takes]" / "*.wav")] == ["1.wav"]


def test_two_spellings_of_one_path_are_said(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", "d/b.wav", "c.wav", "d.wav")
    text = f"uri\na.wav\n./a.wav\nd/b.wav\nd//b.wav\nd/../c.wav\n{tmp_path}/c.wav\nd.wav\n"
    path = write(tmp_path, "list.csv", text)
    assert len(rows_of(path)) == 7
    said = notes_of(path)
    assert "3 uris that spell the path of another row" in said and "'./a.wav' and 'a.wav'" in said


def test_twins_of_unicode_are_said(tmp_path: Path) -> None:
    put(tmp_path, f"{NFC}/1.wav", f"{NFD}/1.wav", "x/2.wav")
    said = notes_of(tmp_path)
    assert "1 uris that differ from another row only in how accents are encoded" in said
    assert "1 groups of labels that look alike" in said and r"'e\u0301' / 'é'" in said
    path = write(tmp_path, "list.csv", f"uri,label\n1.wav,{NFC}\n2.wav,{NFD}\n3.wav,e\n")
    assert [row["label"] for row in rows_of(path)] == [NFC, NFD, "e"]
    assert r"'e\u0301' / 'é'" in notes_of(path)


def test_labels_that_look_alike() -> None:
    assert look_alikes(["dog", "cat", "cats", "1", "2", "e", "é"]) == []
    pairs = [("Dog", "dog"), ("dog ", "dog"), ("dog_bark", "dog bark"), ("1.1", "1.10"), ("01", "1"), (NFC, NFD)]
    pairs += [("саt", "cat"), ("a\u200bb", "ab"), ("dog\u00a0bark", "dog bark"), ("ﬁre", "fire")]
    for one, two in pairs:
        assert look_alikes([one, two, "other"]) == [sorted([one, two])]


def test_repeated_uris_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "list.csv", "uri\na.wav\nb.wav\na.wav\n")
    with pytest.raises(ListingError, match=r"1 rows repeat the uri of another row \(e.g. a.wav\)"):
        rows_of(path)
