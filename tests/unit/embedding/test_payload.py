"""Windows on their way between processes: what arrives, how exactly, and what stays behind."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from audiomae.artifacts.embeddings import EmbedSettings
from audiomae.corpus.synthetic import generate
from audiomae.embedding import payload as payloads
from audiomae.embedding.decoding import Item, decode_item
from audiomae.embedding.embedder import BatchEncoder
from audiomae.embedding.payload import Payload, quantise
from audiomae.embedding.pieces import BLOCK, Clip
from audiomae.errors import ItemError
from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.encoder import AudioEncoder, EncoderConfig

SETTINGS = EmbedSettings(fingerprint="f" * 64, dim=64, sample_rate=16000, mode="windows", window_s=5, hop_s=5)


def restored(clip: Clip) -> np.ndarray:
    assert clip.scales is not None
    return clip.samples * np.repeat(clip.scales, BLOCK)[: len(clip.samples)]


@pytest.mark.parametrize("length", [1, BLOCK, BLOCK + 1, 16_000])
@pytest.mark.parametrize("level", [0.0, 1e-6, 0.3, 4.0])
def test_quantised_samples_are_within_half_a_step_of_their_block(length: int, level: float) -> None:
    samples = (np.random.default_rng(0).standard_normal(length) * level).astype(np.float32)
    clip = quantise(Clip(0, 1, samples))
    assert clip.samples.dtype == np.int16 and len(clip.scales) == -(-length // BLOCK)  # type: ignore[arg-type]
    step = np.repeat(clip.scales, BLOCK)[:length]  # type: ignore[arg-type]
    assert np.all(np.abs(restored(clip) - samples) <= step * 0.51 + 1e-12)


def test_payloads_arrive_as_they_were_packed() -> None:
    def decode(item: Item) -> Iterator[Clip]:
        if item["uri"] == "bad":
            raise ItemError("open", "EmptyFile", "0 bytes")
        for number in range(item["count"]):
            yield Clip(float(number), number + 1.0, np.full(item["length"], 0.5 + number, np.float32))

    packed = Payload(began=12.5)
    rows = [{"uri": "a", "count": 2, "length": 1000}, {"uri": "bad"}, {"uri": "c", "count": 1, "length": 77}]
    for number, item in enumerate(rows):
        packed.decode(number, item, decode)
    arrived = Payload.unpack(pa.py_buffer(packed.pack()))
    assert arrived.began == 12.5 and arrived.decode_s == packed.decode_s > 0

    def unexpected(item: Item) -> Iterator[Clip]:
        raise AssertionError("decoded again")

    for number, item in ((0, rows[0]), (2, rows[2])):
        clips = list(arrived.replay({**item, "number": number}, unexpected))
        for clip, original in zip(clips, decode(item), strict=True):
            assert (clip.start_s, clip.end_s) == (original.start_s, original.end_s)
            np.testing.assert_allclose(restored(clip), original.samples, atol=1e-4)
    with pytest.raises(ItemError) as caught:
        list(arrived.replay({**rows[1], "number": 1}, unexpected))
    assert (caught.value.stage, caught.value.error_class, caught.value.message) == ("open", "EmptyFile", "0 bytes")


def test_what_does_not_fit_is_decoded_on_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "MAX_SAMPLES", 2500)

    def decode(item: Item) -> Iterator[Clip]:
        yield from (Clip(0, 1, np.ones(1000, np.float32)) for _ in range(item["count"]))

    packed = Payload(began=0)
    rows = [{"uri": "a", "count": 1}, {"uri": "long", "count": 1000}, {"uri": "c", "count": 1}]
    for number, item in enumerate(rows):
        packed.decode(number, item, decode)
    arrived = Payload.unpack(pa.py_buffer(packed.pack()))
    assert sorted(arrived.clips) == [0, 2]
    clips = list(arrived.replay({**rows[1], "number": 1}, decode))
    assert len(clips) == 1000 and clips[0].samples.dtype == np.int16


def test_an_empty_payload_arrives() -> None:
    assert Payload.unpack(pa.py_buffer(Payload(began=1).pack())).clips == {}


def embeddings_move_by(root: Path, uris: list[str]) -> float:
    encoder = AudioEncoder.from_config(EncoderConfig(backbone=AudioMAEConfig.model_validate({"size": "debug"})))
    encode = BatchEncoder(encoder, 32)
    clips = [clip for uri in uris for clip in decode_item({"uri": uri}, str(root), SETTINGS)]
    return float((1 - (encode(clips) * encode([quantise(clip) for clip in clips])).sum(axis=1)).max())


def test_embeddings_of_generated_audio_stay_within_the_contract(tmp_path: Path) -> None:
    root = generate(tmp_path / "corpus", num_clips=24, bad_files=False)
    uris = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.suffix != ".csv")
    assert embeddings_move_by(root, uris) < 1e-5


def test_embeddings_of_real_audio_stay_within_the_contract(esc10: Path) -> None:
    uris = sorted(str(path.relative_to(esc10)) for path in esc10.rglob("*.ogg"))
    assert embeddings_move_by(esc10, uris[::20]) < 1e-5
