import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from audiomae.corpus.decode import decode, probe
from audiomae.corpus.manifest import list_corpus
from audiomae.corpus.opening import DecodeLimits
from audiomae.corpus.sounds import SOUNDS
from audiomae.corpus.synthetic import generate, main, render
from audiomae.errors import DecodeError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("synthetic"), num_clips=72, seed=3)


def rows(corpus: Path) -> list[dict[str, str]]:
    with (corpus / "listing.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_classes_and_folds_are_balanced(corpus: Path) -> None:
    good = [row for row in rows(corpus) if row["label"]]
    assert len(SOUNDS) >= 10
    assert set(Counter(row["label"] for row in good).values()) == {6}
    assert {row["fold"] for row in good} == {"1", "2", "3", "4", "5"}
    assert all(row["uri"].startswith(row["label"] + "/") for row in good)


def test_formats_rates_channels_and_lengths_vary(corpus: Path) -> None:
    infos = [probe(corpus / row["uri"]) for row in rows(corpus) if row["label"]]
    assert {info.codec for info in infos} == {
        "wav/pcm_16",
        "wav/pcm_24",
        "wav/float",
        "wavex/pcm_24",
        "flac/pcm_16",
        "ogg/vorbis",
        "mp3/mpeg_layer_iii",
    } - ({"wavex/pcm_24"} if all(info.codec != "wavex/pcm_24" for info in infos) else set())
    assert len({info.sample_rate for info in infos}) >= 6
    assert {info.channels for info in infos} == {1, 2}
    lengths = [info.duration_s or 0 for info in infos]
    assert min(lengths) >= 0.29 and max(lengths) <= 12.1 and max(lengths) > 8 * min(lengths)


def test_bad_files_fail_for_their_reasons_and_silence_does_not(corpus: Path) -> None:
    expected = {
        "bad_empty.wav": "EmptyFile",
        "bad_text.wav": "UnknownFormat",
        "bad_nan.wav": "NonFiniteSamples",
        "bad_truncated.wav": "TruncatedFile",
        "bad_truncated.flac": "TruncatedFile",
    }
    for uri, name in expected.items():
        with pytest.raises(DecodeError) as caught:
            decode(corpus / uri, 16000, limits=DecodeLimits(on_damage="fail"))
        assert caught.value.error_class == name
    assert not decode(corpus / "silence.wav", 16000).any()
    assert {row["uri"] for row in rows(corpus) if not row["label"]} == {*expected, "silence.wav"}


def test_folder_and_listing_name_the_same_files(corpus: Path) -> None:
    def uris(source: Path) -> set[str]:
        return {uri for table in list_corpus(str(source)).batches() for uri in table["uri"].to_pylist()}

    assert uris(corpus) == uris(corpus / "listing.csv") == {row["uri"] for row in rows(corpus)}


def test_same_seed_same_bytes(corpus: Path, tmp_path: Path) -> None:
    again = generate(tmp_path / "again", num_clips=72, seed=3)
    for row in rows(corpus):
        one, other = corpus / row["uri"], again / row["uri"]
        if one.suffix == ".ogg":  # libsndfile draws the stream's serial number
            np.testing.assert_array_equal(decode(one, 16000), decode(other, 16000))
        else:
            assert one.read_bytes() == other.read_bytes(), row["uri"]
    assert (corpus / "listing.csv").read_bytes() == (again / "listing.csv").read_bytes()


def test_other_seed_other_sounds(corpus: Path, tmp_path: Path) -> None:
    other = generate(tmp_path / "other", num_clips=12, seed=4, bad_files=False)
    uri = "bell/bell_0000.wav"
    assert (other / uri).read_bytes() != (corpus / uri).read_bytes()
    assert not list(other.glob("bad_*"))


@pytest.mark.parametrize("label", list(SOUNDS))
@pytest.mark.parametrize(("rate", "seconds"), [(8000, 0.3), (48000, 1.0)])
def test_every_recipe_gives_finite_sound_within_full_scale(label: str, rate: int, seconds: float) -> None:
    for seed in range(3):
        clip = render(label, np.random.default_rng(seed), rate, seconds)
        assert clip.dtype == np.float32 and len(clip) == int(rate * seconds)
        assert 0.05 < np.abs(clip).max() <= 1.0


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out"), "--clips", "12", "--no-bad-files"]) == 0
    assert "12 clips of 12 classes" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*/*.*"))) == 12
