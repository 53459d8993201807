"""What a newcomer is told when something is missing: one line that says what to do, and no traceback."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import soundfile

from audiomae import s3
from audiomae.cli import run_job, waiting
from audiomae.config import build_config
from audiomae.errors import UserError
from audiomae.model.encoder import AudioEncoder, EncoderConfig
from ray_jobs import build_index, embed_corpus, evaluate_retrieval, train
from ray_jobs._ray import FALSE_ALARM, connect, without_false_alarm

Main = Callable[[], int | None]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "sounds").mkdir()
    for number in range(2):
        soundfile.write(folder / "sounds" / f"{number}.wav", np.full(8_000, 0.1 * (number + 1)), 16_000)
    AudioEncoder.from_config(build_config(EncoderConfig, {"backbone": {"size": "debug"}})).save(folder / "encoder")
    return folder


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Someone whom AWS does not know, on a machine without a role."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3._client.cache_clear()
    yield
    s3._client.cache_clear()


def said(main: Main, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with when it fails."""
    with pytest.raises(SystemExit) as exit_:
        run_job(main)
    assert exit_.value.code in (1, 2)
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if "error: " in line]
    assert error.rstrip().endswith(line) and "Traceback" not in error
    return line


@pytest.mark.parametrize("place", ["encoder", "corpus", "out", "embeddings", "evaluated"])
def test_s3_without_credentials(place: str, stranger: None, sounds: Path, capsys, tmp_path: Path) -> None:
    given = {"encoder": str(sounds / "encoder"), "corpus": str(sounds / "sounds"), "out": str(tmp_path / "out")}
    remote = "s3://a-bucket-of-others/there"
    if place in given:
        given[place] = remote
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
        line = said(lambda: embed_corpus.main([*words, "--check"]), capsys)
    else:
        job = build_index if place == "embeddings" else evaluate_retrieval
        line = said(lambda: job.main(["--embeddings", remote, "--out", given["out"]]), capsys)
    assert "AWS_ACCESS_KEY_ID" in line and "credentials" in line


@pytest.mark.parametrize(
    ("encoder", "told"),
    [
        ("timm:nope", ["timm:nope", "hf_hub:OWNER/NAME", "local-dir:PATH"]),
        ("timm:resnet10t.c3_in1k", ["timm:resnet10t", "hf_hub:OWNER/NAME"]),
        ("timm:local-dir:/nowhere", ["/nowhere", "config.json and model.safetensors"]),
        ("official:/nowhere", ["official:/nowhere", "no such file"]),
        ("nowhere", ["nowhere", "no encoder here"]),
    ],
)
def test_an_encoder_that_is_not_there(encoder: str, told: list[str], sounds: Path, capsys, tmp_path: Path) -> None:
    words = ["--corpus", str(sounds / "sounds"), "--out", str(tmp_path / "out"), "--encoder", encoder]
    line = said(lambda: embed_corpus.main(words), capsys)
    assert all(text in line for text in told), line
    words = ["--corpus", str(sounds / "sounds"), "--storage", str(tmp_path), "--name", "first", "--init", encoder]
    line = said(lambda: train.main(words), capsys)
    assert all(text in line for text in told), line


def test_a_text_model_that_is_not_there(sounds: Path, capsys, tmp_path: Path) -> None:
    words = ["--corpus", str(sounds / "sounds"), "--storage", str(tmp_path), "--name", "first", "--recipe", "clap"]
    line = said(lambda: train.main([*words, "--set", "encoder.text.model=nobody/nothing"]), capsys)
    assert "nobody/nothing" in line and "local directory" in line


def test_captions_without_a_text_model(sounds: Path, capsys, tmp_path: Path) -> None:
    words = ["--corpus", str(sounds / "sounds"), "--storage", str(tmp_path), "--name", "first"]
    line = said(lambda: train.main([*words, "--objective.clap", "1"]), capsys)
    assert "objective.clap" in line and "encoder.text.model=" in line and "--recipe clap" in line


@pytest.mark.parametrize("clip", [str, Path])
def test_one_file_is_a_list_of_one(clip: type, sounds: Path) -> None:
    encoder = AudioEncoder.load(sounds / "encoder", device="cpu")
    one = sounds / "sounds" / "0.wav"
    assert (encoder.embed(clip(one)) == encoder.embed([clip(one)])).all()


def test_what_a_task_raised_is_said_without_its_traceback(capsys) -> None:
    class RayTaskError(Exception):
        cause = UserError("no such column")

    def main() -> int:
        raise RayTaskError("Traceback (most recent call last): ...")

    assert said(main, capsys) == "error: no such column"


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> int:
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_job(main)

    def missing() -> int:
        raise FileNotFoundError("x")

    monkeypatch.setenv("AUDIOMAE_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        run_job(missing)


def test_long_waits_are_said(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("audiomae.cli.SAID_AFTER_S", 0.0)
    monkeypatch.setattr("audiomae.cli.SAID_EVERY_S", 0.0)
    with waiting("starting Ray"):
        while not (lines := capsys.readouterr().err.splitlines()):
            pass
    assert lines[0].startswith("starting Ray: ") and lines[0].endswith(" so far")


def test_rays_false_alarm_is_kept_from_a_good_run_and_nothing_else(capfd) -> None:
    alarm = "core_worker.cc:2465: Actor with class name: 'MapWorker' and ID: '3' "
    with without_false_alarm():
        os.write(2, b"one\n" + alarm.encode() + FALSE_ALARM + b". If the arguments ...\ntwo\n")
        print("three", file=sys.__stderr__)
    os.write(2, b"four\n")
    assert capfd.readouterr().err.split() == ["one", "two", "three", "four"]


def test_a_ray_that_does_not_start_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...")  # as Ray does

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    assert "Ray did not start" in said(lambda: connect(), capsys)
