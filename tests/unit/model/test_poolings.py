"""All poolings from one pass of the backbone are those that separate encoders give."""

import pytest
import torch

from audiomae.errors import ConfigError
from audiomae.model.audiomae import AudioMAEConfig
from audiomae.model.encoder import AudioEncoder, EncoderConfig, ProjectionConfig
from audiomae.model.poolings import comparable, pooled

DEBUG = AudioMAEConfig(size="debug")


@pytest.mark.parametrize("official", [False, True])
def test_one_pass_gives_what_each_pooling_gives_alone(official, monkeypatch) -> None:
    encoder = AudioEncoder.from_config(EncoderConfig(backbone=DEBUG, official_windows=official))
    sound = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(0)) * 0.1
    lengths = torch.tensor([40_000, 25_000])
    expected = {p.name: encoder.with_pooling(p.name)(sound, lengths) for p in comparable(encoder)}
    passes = counted(encoder, monkeypatch)
    found = pooled(encoder, comparable(encoder), sound, lengths)
    several = sum(passes)
    assert set(found) == {"mean", "cls", "mean_cls", "cls_mean_concat", "max", "attention_score", "freq_concat"}
    for name, vectors in found.items():
        torch.testing.assert_close(vectors, expected[name], atol=1e-5, rtol=0)
    passes.clear()
    encoder(sound, lengths)
    assert several == (2 if official else 1) * sum(passes)


def counted(encoder: AudioEncoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces each call of the backbone encodes from now on."""
    passes: list[int] = []
    run = encoder.backbone.encode

    def encode(x, *args, **more):
        passes.append(len(x))
        return run(x, *args, **more)

    monkeypatch.setattr(encoder.backbone, "encode", encode)
    return passes


def test_a_projection_and_unlearnt_attention_are_refused_with_the_reason() -> None:
    projected = AudioEncoder.from_config(EncoderConfig(backbone=DEBUG, projection=ProjectionConfig(dim=8)))
    with pytest.raises(ConfigError, match="trained on its mean pooling"):
        comparable(projected)
    with pytest.raises(ConfigError, match="its scores are learnt, and this encoder was trained with mean"):
        comparable(AudioEncoder.from_config(EncoderConfig(backbone=DEBUG)), ["attention"])
