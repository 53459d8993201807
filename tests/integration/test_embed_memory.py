"""A recording of a day needs hardly more memory than one of ten minutes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from audiomae.artifacts.embeddings import EmbeddingSet, EmbedSettings, write_run
from audiomae.embedding.decoding import EmbedJob
from audiomae.embedding.listing import Listing
from audiomae.embedding.plan import PlanRequest, new_plan
from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.encoder import AudioEncoder, EncoderConfig

RATE, DAY_S = 8000, 86_400
MODES = ["windows", "file"]
EMBED = """
import json, resource, sys
import pyarrow as pa
from audiomae.embedding.decoding import EmbedJob
from audiomae.embedding.stages import FusedStage
stage = FusedStage(EmbedJob.model_validate_json(sys.argv[1]))
started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for entry in json.loads(sys.argv[2]):
    report = stage(pa.table({"entries": [[entry]]})).to_pylist()[0]
    assert report["status"] == "committed", report
print(json.dumps([started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def recording(path: Path, seconds: int) -> Path:
    """Noise that swells and fades, written a minute at a time."""
    rng = np.random.default_rng(0)
    minute = rng.standard_normal(RATE * 60).astype(np.float32) * np.linspace(0.01, 0.3, RATE * 60, dtype=np.float32)
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_U8") as file:
        for _ in range(seconds // 60):
            file.write(minute)
    return path


def peak_mib(folder: Path, encoder: Path, seconds: int, mode: str) -> float:
    """Embed a recording of that length in a process of its own; by how many MiB its memory peaked above its start."""
    folder.mkdir()
    source = recording(folder / "long.wav", seconds)
    model = AudioEncoder.load(encoder)
    settings = EmbedSettings.model_validate(
        {
            "fingerprint": model.fingerprint,
            "dim": model.dim,
            "sample_rate": model.sample_rate,
            "mode": mode,
            "window_s": 5,
            "hop_s": 5,
        }
    )
    table = {"uri": [source.name], "size": [source.stat().st_size], "content_id": ["c"]}

    listing = Listing([pa.table(table)])
    request = PlanRequest(str(encoder), str(folder), str(folder))
    plan = new_plan(folder / "out", listing, settings, lambda uris: [float(seconds)] * len(uris), request)
    job = EmbedJob(out=str(folder / "out"), encoder=str(encoder), root=str(folder), settings=settings, manifest="m")
    entries = json.dumps([entry.model_dump_json() for entry in plan.shards])
    output = subprocess.run(
        [sys.executable, "-c", EMBED, job.model_dump_json(), entries], check=True, capture_output=True, text=True
    ).stdout
    write_run(folder / "out", settings.model_dump())
    rows = EmbeddingSet.open(folder / "out").num_rows
    assert rows == (1 if mode == "file" else seconds // 5)
    started, peak = json.loads(output.splitlines()[-1])
    return (peak - started) / 1024


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("mode", MODES)
def test_a_day_needs_no_more_than_ten_minutes_and_300_mb(tmp_path: Path, mode: str) -> None:
    encoder = tmp_path / "encoder"
    AudioEncoder.from_config(EncoderConfig(backbone=AudioMAEConfig.model_validate({"size": "debug"}))).save(encoder)
    short = peak_mib(tmp_path / "short", encoder, 600, mode)
    day = peak_mib(tmp_path / "day", encoder, DAY_S, mode)
    print(f"{mode}: 10 min {short:.0f} MiB, 24 h {day:.0f} MiB above the loaded encoder")
    assert day - short < 300
