"""The held-out side of a corpus, and what is said about it."""

import numpy as np
import pyarrow as pa
import pytest

from audiomae.artifacts.features import FeatureStore, Segment, read_clips, write_shard
from audiomae.artifacts.shard_cache import ShardCache
from audiomae.training.split import cautions, held_out, repeated, source_of


@pytest.mark.parametrize(
    ("uri", "source"),
    [
        ("dog/1-100032-A.ogg", "dog/1-100032"),
        ("dog/1-100032-B.ogg", "dog/1-100032"),
        ("talk_part2.wav", "talk"),
        ("talk.chunk_17.flac", "talk"),
        ("bird_001.wav", "bird_001.wav"),  # numbers count recordings more often than takes
        ("a/b.c/rain.wav", "a/b.c/rain.wav"),
    ],
)
def test_takes_of_one_recording_are_known_by_their_names(uri, source) -> None:
    assert source_of(uri) == source


def test_a_recording_is_on_one_side_and_each_class_gives_its_share() -> None:
    uris = [f"{label}/{number}-{take}.ogg" for label in ("a", "b") for number in range(20) for take in "AB"]
    labels = [uri[0] for uri in uris]
    chosen = held_out(uris, labels, 0.1, seed=0)
    assert [chosen[np.array(labels) == label].sum() for label in ("a", "b")] == [4, 4]
    out = {source_of(uri) for uri, side in zip(uris, chosen, strict=True) if side}
    assert not out & {source_of(uri) for uri, side in zip(uris, chosen, strict=True) if not side}
    assert held_out(uris, labels, 0.0, seed=0).sum() == 0
    assert not np.array_equal(chosen, held_out(uris, labels, 0.1, seed=1))


def items(labels: list[str | None], validation: list[bool], uris: list[str] | None = None) -> pa.Table:
    return pa.table(
        {
            "uri": uris or [f"{number:03d}.wav" for number in range(len(labels))],
            "label": pa.array(labels, pa.string()),
            "validation": validation,
        }
    )


def test_what_a_person_needs_is_said_and_nothing_else() -> None:
    good = items(["a", "b"] * 100, [False] * 170 + [True] * 30)
    assert cautions(good, steps=1000) == []
    (said,) = cautions(good, steps=12)
    assert "only 12 optimiser steps" in said
    (said,) = cautions(items(["a"] * 200, [False] * 170 + [True] * 30), 1000)
    assert "has the label 'a'" in said
    assert "no clip is held out" in cautions(items([None] * 5, [False] * 5), 1000)[0]
    assert "only 2 files are held out" in cautions(items([None] * 5, [False] * 3 + [True] * 2), 1000)[0]
    takes = items([None] * 4, [False, True] * 2, ["1-A.wav", "1-B.wav", "2-A.wav", "3-A.wav"])
    assert any("1 held-out clips come from recordings that are trained on" in line for line in cautions(takes, 1000))
    assert any("3 held-out clips are copies" in line for line in cautions(good, 1000, copies=3))


def test_copies_are_found_by_how_they_sound(tmp_path) -> None:
    sounds = {"a": 1.0, "b": 2.0, "copy of a": 1.0}

    def extract(uri: str) -> list[Segment]:
        return [Segment(0.0, 1.0, np.full((10, 4), sounds[uri]))]

    write_shard(str(tmp_path), 0, list(sounds), extract)
    clips = read_clips(str(tmp_path), 1)
    store = FeatureStore(ShardCache(str(tmp_path)), clips["shard"], clips["first_frame"], clips["frames"])
    assert repeated(store, np.array([False, False, True])) == 1
    assert repeated(store, np.array([False, True, False])) == 0
