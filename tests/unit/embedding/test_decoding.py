"""Decoding work items here and in a child process, and children that die."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audiomae.artifacts.embeddings import EmbedSettings
from audiomae.corpus.decode import CANCELS
from audiomae.embedding.decoding import EmbedJob, IsolatedDecoder, decode_item, decoder_of
from audiomae.embedding.pieces import Damage
from audiomae.errors import ItemError

SETTINGS = EmbedSettings(fingerprint="f" * 64, dim=2, sample_rate=8000, mode="windows", window_s=1, hop_s=1)

FAULTS = """
import ctypes, os, signal, time
from audiomae.corpus import decode

original = decode.iter_windows

def faulty(source, *args, **kwargs):
    name = os.path.basename(str(source))
    if "segfault" in name:
        ctypes.string_at(0)
    if "killed" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hangs" in name:
        signal.pause()
    if "bomb" in name:
        bytearray(1 << 40)
    for number, window in enumerate(original(source, *args, **kwargs)):
        yield window
        if "halfway" in name and number == 1:
            os._exit(7)

decode.iter_windows = faulty
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name in ("good", "other", "segfault", "killed", "hangs", "bomb", "halfway"):
        soundfile.write(tmp_path / f"{name}.wav", np.linspace(-0.5, 0.5, 8000 * 3 + 4000), 8000)
    return tmp_path


@pytest.fixture
def faults(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that, on a process' path when it starts, injects faults into its decoder."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "sitecustomize.py").write_text(textwrap.dedent(FAULTS))
    return str(folder)


@pytest.fixture
def isolated(corpus: Path, faults: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[IsolatedDecoder]:
    """An isolated decoder whose children (not this process) have the faults."""
    monkeypatch.syspath_prepend(faults)
    decoder = IsolatedDecoder(str(corpus), SETTINGS, stall_timeout_s=250)
    yield decoder
    decoder.close()


def reason(decoder: IsolatedDecoder, name: str) -> ItemError:
    with pytest.raises(ItemError) as caught:
        list(decoder({"uri": f"{name}.wav"}))
    return caught.value


def test_windows_and_segments_of_an_item(corpus: Path) -> None:
    whole = list(decode_item({"uri": "good.wav"}, str(corpus), SETTINGS))
    assert [(clip.start_s, clip.end_s) for clip in whole] == [(0, 1), (1, 2), (2, 3), (3, 3.5)]
    parts = [
        clip
        for start, end in ((0.0, 2.0), (2.0, float("inf")))
        for clip in decode_item(
            {"uri": "good.wav", "segment_start_s": start, "segment_end_s": end}, str(corpus), SETTINGS
        )
    ]
    for clip, part in zip(whole, parts, strict=True):
        assert (clip.start_s, clip.end_s) == (part.start_s, part.end_s)
        np.testing.assert_array_equal(clip.samples, part.samples)


def test_damage_and_notes_of_an_item(corpus: Path) -> None:
    samples = np.sin(np.arange(8000 * 4))
    soundfile.write(corpus / "cancels.wav", np.stack([samples, -samples], axis=1), 8000)
    data = (corpus / "cancels.wav").read_bytes()
    (corpus / "cut.wav").write_bytes(data[: 44 + 4 * 8000 * 2 + 400])
    assert {piece.note for piece in decode_item({"uri": "cancels.wav"}, str(corpus), SETTINGS)} == {CANCELS}
    *clips, damage = decode_item({"uri": "cut.wav"}, str(corpus), SETTINGS)
    assert len(clips) == 2 and isinstance(damage, Damage)
    assert (damage.start_s, damage.end_s, damage.error_class) == (2.0125, 4.0, "TruncatedFile")
    for start, end, found in ((0.0, 2.0, 0), (2.0, float("inf"), 1)):  # of two segments, the one it lies in says it
        item = {"uri": "cut.wav", "segment_start_s": start, "segment_end_s": end}
        pieces = list(decode_item(item, str(corpus), SETTINGS))
        assert sum(isinstance(piece, Damage) for piece in pieces) == found
    strict = SETTINGS.model_copy(update={"on_damage": "fail"})
    with pytest.raises(ItemError, match="TruncatedFile"):
        list(decode_item({"uri": "cut.wav"}, str(corpus), strict))
    left = SETTINGS.model_copy(update={"channel": "left"})
    assert {piece.note for piece in decode_item({"uri": "cancels.wav"}, str(corpus), left)} == {None}


def test_what_is_wrong_with_a_file_is_an_item_error(corpus: Path) -> None:
    (corpus / "text.wav").write_text("not audio")
    for uri in ("text.wav", "nowhere.wav", "."):
        with pytest.raises(ItemError) as caught:
            list(decode_item({"uri": uri}, str(corpus), SETTINGS))
        assert caught.value.stage and caught.value.error_class and caught.value.message
        assert not caught.value.passing


def test_an_isolated_decoder_gives_the_same_windows(isolated: IsolatedDecoder, corpus: Path) -> None:
    for _ in range(2):
        here = list(decode_item({"uri": "good.wav"}, str(corpus), SETTINGS))
        for clip, other in zip(here, isolated({"uri": "good.wav"}), strict=True):
            assert clip[:2] == other[:2]
            np.testing.assert_array_equal(clip.samples, other.samples)


def test_a_child_that_dies_is_a_reason_and_the_next_file_decodes(isolated: IsolatedDecoder) -> None:
    for name, how in (("segfault", "signal 11"), ("killed", "signal 9"), ("halfway", "status 7")):
        error = reason(isolated, name)
        assert (error.error_class, error.passing) == ("ProcessDied", True) and how in error.message
        assert len(list(isolated({"uri": "other.wav"}))) == 4
    assert reason(isolated, "bomb").error_class == "MemoryError"
    assert len(list(isolated({"uri": "good.wav"}))) == 4


def test_a_decoder_that_hangs_is_given_up(isolated: IsolatedDecoder) -> None:
    list(isolated({"uri": "good.wav"}))  # the child is up
    isolated.stall_timeout_s = 0.5
    assert reason(isolated, "hangs").error_class == "Stalled"
    isolated.stall_timeout_s = 250
    assert len(list(isolated({"uri": "good.wav"}))) == 4


def test_a_worker_whose_decoder_hangs_ends(corpus: Path, faults: str) -> None:
    script = f"""
from audiomae.embedding.decoding import EmbedJob, EmbedSettings, decoder_of
settings = EmbedSettings(**{SETTINGS.model_dump()!r})
job = dict(out="", encoder="", root={str(corpus)!r}, settings=settings, manifest="")
print(len(list(decoder_of(EmbedJob(**job))({{"uri": "good.wav"}}))), flush=True)
list(decoder_of(EmbedJob(**job, stall_timeout_s=0.5))({{"uri": "hangs.wav"}}))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([faults, *filter(None, sys.path)])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (-signal.SIGALRM, b"4\n")


def test_watching_a_decoder_leaves_other_alarms_as_they_were(corpus: Path) -> None:
    job = EmbedJob(out="", encoder="", root=str(corpus), settings=SETTINGS, manifest="", stall_timeout_s=200)
    before = signal.getitimer(signal.ITIMER_REAL)
    for _ in decoder_of(job)({"uri": "good.wav"}):
        assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (before[0] > 0)
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (before[0] > 0)


def test_the_child_ends_with_its_parent(isolated: IsolatedDecoder) -> None:
    list(isolated({"uri": "good.wav"}))
    child = isolated._child
    assert child is not None and child.poll() is None
    assert isolated._pipe is not None
    isolated._pipe.close()
    assert child.wait(timeout=30) == 0
