"""`make demo` called again goes on with what is there."""

from pathlib import Path

from ray_jobs.demo import generated


def test_a_generated_corpus_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    listing = generated(tmp_path / "corpus", 24)
    before = {path: path.stat().st_mtime_ns for path in listing.parent.rglob("*") if path.is_file()}
    assert len(before) > 24 and generated(tmp_path / "corpus", 24) == listing
    assert {path: path.stat().st_mtime_ns for path in before} == before

    lines = listing.read_text().splitlines()
    listing.write_text("\n".join(lines[:10]))  # a demo that was ended while it wrote
    generated(tmp_path / "corpus", 24)
    assert listing.read_text().splitlines() == lines
    generated(tmp_path / "corpus", 48)
    assert len(listing.read_text().splitlines()) == len(lines) + 24
