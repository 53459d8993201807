"""What the benchmarks compare with computes what it claims to."""

import pytest
import torch
from _official import embed_sound, use_official_attention

from audiomae.config import build_config
from audiomae.model.encoder import AudioEncoder, EncoderConfig


@pytest.mark.parametrize("seconds", [1.19, 3.99, 4.99])
def test_the_official_way_gives_what_the_encoder_gives_in_official_windows(seconds):
    config = build_config(EncoderConfig, {"backbone": {"size": "debug"}, "official_windows": True})
    ours = AudioEncoder.from_config(config).eval()
    official = AudioEncoder.from_config(config).eval()
    use_official_attention(official)
    sound = torch.randn(round(seconds * ours.sample_rate), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = ours(sound[None])[0]
    assert torch.cosine_similarity(embed_sound(official, sound), expected, dim=0) > 0.9999
