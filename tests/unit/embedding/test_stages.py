"""What the workers of one job agree on before they encode."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from audiomae.artifacts.embeddings import agree_on_precision, committed_shards, joined_precision, settled_precision
from audiomae.artifacts.tables import EmbedSettings
from audiomae.embedding.decoding import EmbedJob
from audiomae.embedding.listing import Listing
from audiomae.embedding.pieces import Clip
from audiomae.embedding.plan import PlanRequest, new_plan
from audiomae.embedding.stages import FusedStage
from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.encoder import AudioEncoder, EncoderConfig


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> EmbedJob:
    folder = tmp_path_factory.mktemp("encoder")
    encoder = AudioEncoder.from_config(EncoderConfig(backbone=AudioMAEConfig(size="debug")), seed=0)
    encoder.save(folder)
    settings = EmbedSettings(
        fingerprint=encoder.fingerprint, dim=encoder.dim, sample_rate=16_000, mode="windows", window_s=2, hop_s=2
    )
    return EmbedJob(out="", encoder=str(folder), root="", settings=settings, manifest="m", device="cpu")


def precision_of(job: EmbedJob, out: Path, dtype: str = "auto") -> str:
    return FusedStage(job.model_copy(update={"out": str(out), "dtype": dtype})).encode.encoder.precision


def test_workers_on_unlike_machines_compute_in_one_precision(job: EmbedJob, tmp_path: Path) -> None:
    assert settled_precision(tmp_path) is None
    assert precision_of(job, tmp_path / "cpu") == "float32" == settled_precision(tmp_path / "cpu")
    # the first worker had a GPU with bfloat16: this one has none and follows
    assert agree_on_precision(tmp_path / "gpu", "bfloat16") == "bfloat16"
    assert precision_of(job, tmp_path / "gpu") == "bfloat16"


def test_a_precision_that_was_asked_for_is_kept(job: EmbedJob, tmp_path: Path) -> None:
    agree_on_precision(tmp_path, "float32")
    assert precision_of(job, tmp_path, "bfloat16") == "bfloat16"


def test_a_block_is_committed_shard_by_shard_and_reported_in_its_order(job: EmbedJob, tmp_path: Path) -> None:
    listing = Listing([pa.table({"uri": ["a.wav", "b.wav", "c.wav"], "size": [0] * 3, "content_id": ["x"] * 3})])
    plan = new_plan(tmp_path, listing, job.settings, list, PlanRequest("e", "c", str(tmp_path), shard_cost_s=1.0))
    stage = FusedStage(job.model_copy(update={"out": str(tmp_path), "root": str(tmp_path)}))
    block = pa.table({"entries": [[entry.model_dump_json() for entry in plan.shards]]})
    assert len(plan.shards) == 3 and plan.shards[0].name not in committed_shards(tmp_path)
    reports = stage(block).to_pylist()
    assert [report["shard"] for report in reports] == [entry.name for entry in plan.shards]
    assert {report["status"] for report in reports} == {"committed"}
    assert committed_shards(tmp_path) == {entry.name for entry in plan.shards}
    assert {report["status"] for report in stage(block).to_pylist()} == {"duplicate"}


def test_several_precisions_have_one_name() -> None:
    assert joined_precision([None, None]) is None
    assert joined_precision(["float32", None, "float32"]) == "float32"
    assert joined_precision(["float32", "bfloat16"]) == "bfloat16+float32"


def test_an_encoder_that_cannot_be_compiled_goes_on_as_it_is(job, tmp_path, monkeypatch, capsys) -> None:
    def compile_blocks(encoder: AudioEncoder) -> None:
        def broken(*_: object) -> None:
            raise RuntimeError("no C compiler\nand a long story")

        monkeypatch.setattr(encoder.backbone.blocks[0], "forward", broken)

    monkeypatch.setattr(AudioEncoder, "compile_blocks", compile_blocks)
    stage = FusedStage(job.model_copy(update={"out": str(tmp_path)}))
    before = stage.encode
    assert stage._compiled() is None and stage.encode is before
    assert capsys.readouterr().out == "note: the encoder runs uncompiled: RuntimeError: no C compiler\n"


@pytest.mark.slow  # the compiler takes half a minute
def test_compiled_blocks_compute_the_same(job, tmp_path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler: install g++")
    stage = FusedStage(job.model_copy(update={"out": str(tmp_path)}))
    compiled = stage._compiled()
    assert compiled is not None and compiled.encoder.fingerprint == stage.encode.encoder.fingerprint
    draw = np.random.default_rng(0)
    clips = [
        Clip(0.0, seconds, draw.normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)) for seconds in (2, 1.3, 0.4)
    ]
    np.testing.assert_allclose(compiled(clips), stage.encode(clips), atol=1e-5)
