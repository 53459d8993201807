"""No file, whatever is in it, may crash the process, fill its memory, hang, or fail without a reason."""

import json
import subprocess
import sys
from collections import Counter

import pytest

from tests.mutations import make_mutated_files

# In a process of its own: a crash of a C library is then a failed test, and memory and CPU are those of decoding alone.
CHILD = """
import json, resource, sys, time
from audiomae.corpus.decode import DecodeError, DecodeReport, iter_windows
for line in sys.stdin:
    began, report = time.process_time(), DecodeReport()
    try:
        windows = iter_windows(line.rstrip("\\n"), 16000, 5, 5, report=report)
        seconds = sum(len(window.samples) for window in windows) / 16000
        result = ["ok", seconds, " ".join(span.error_class for span in report.lost)]
    except DecodeError as error:
        result = [error.error_class, 0, error.message]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([*result, time.process_time() - began, memory]), flush=True)
"""
KNOWN = {"NotFound", "PermissionDenied", "NotAFile", "EmptyFile", "UnknownFormat", "ReadFailed", "RateOutOfRange"}
KNOWN |= {"TooManyChannels", "TooLarge", "TooLong", "TooSlow", "CorruptAudio", "TruncatedFile", "NoAudio"}
KNOWN |= {"NonFiniteSamples", "AmplitudeOutOfRange"}
EXPECTED = {
    "empty.wav": {"EmptyFile"},
    "text.wav": {"UnknownFormat"},
    "html.wav": {"UnknownFormat"},
    "png.wav": {"UnknownFormat"},
    "playlist.wav": {"UnknownFormat"},
    "concat_script.wav": {"UnknownFormat"},
    "zero_hz.wav": {"RateOutOfRange", "UnknownFormat"},
    "ten_megahertz.wav": {"RateOutOfRange"},
    "64_channels.wav": {"ok"},
    "65535_channels.wav": {"TooManyChannels", "UnknownFormat"},
    "long_length.wav": {"ok"},
    "no_samples.wav": {"NoAudio"},
    "one_sample.wav": {"ok"},
    "nan.wav": {"ok"},
    "infinite.wav": {"ok"},
    "amplitude_1e30.wav": {"AmplitudeOutOfRange"},
    "silence.wav": {"ok"},
    "bomb.flac": {"ok"},
    "sparse.wav": {"ok"},
    "directory.wav": {"NotAFile"},
    "pipe.wav": {"NotAFile"},
    "broken_link.wav": {"NotFound"},
    "absent.wav": {"NotFound"},
    "link_to_itself.wav": {"NotFound"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    paths = make_mutated_files(tmp_path_factory.mktemp("mutated") / "files")
    assert len(paths) >= 200
    command = [sys.executable, "-c", CHILD]
    child = subprocess.run(command, input="".join(f"{path}\n" for path in paths), capture_output=True, text=True)
    lines = child.stdout.splitlines()
    assert len(lines) == len(paths), f"{paths[len(lines)]} ended the process: {child.stderr[-2000:]}"
    return {path.name: json.loads(line) for path, line in zip(paths, lines, strict=True)}


def test_every_file_is_embedded_or_fails_with_a_reason(results: dict[str, list]) -> None:
    for name, (kind, seconds, message, _, _) in results.items():
        assert kind in KNOWN | {"ok"}, name
        assert (kind == "ok" and seconds > 0) or message, name


def test_the_reasons_are_the_right_ones(results: dict[str, list]) -> None:
    wrong = {name: results[name][0] for name, kinds in EXPECTED.items() if results[name][0] not in kinds}
    assert not wrong
    said = {name: results[name][2] for name in ("long_length.wav", "nan.wav", "infinite.wav")}
    assert said == {
        "long_length.wav": "TruncatedFile",
        "nan.wav": "NonFiniteSamples",
        "infinite.wav": "NonFiniteSamples",
    }
    cut = {name: (kind, said) for name, (kind, _, said, *_) in results.items() if name.startswith("cut_0.3.")}
    assert Counter(bool(said) for _, said in cut.values())[False] <= 4  # raw streams do not say how long they should be


def test_time_and_memory_stay_bounded(results: dict[str, list]) -> None:
    slow = {name: cpu for name, (*_, cpu, _) in results.items() if cpu > 30}
    assert not slow
    memory = [row[-1] for row in results.values()]
    assert memory[-1] - memory[0] < 200 * 1024  # KiB of high-water mark, over everything after the first file
