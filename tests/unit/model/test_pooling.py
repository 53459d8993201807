"""Every pooling against a slow reference, with padding of arbitrary content."""

import pytest
import torch

from audiomae.model.pooling import POOLINGS, Pooling

STEPS, BANDS, DIM = 4, 3, 6
REAL_STEPS = [4, 2, 1]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 1 + STEPS * BANDS, DIM, generator=generator)
    real = torch.arange(STEPS) < torch.tensor(REAL_STEPS)[:, None]
    mask = torch.cat([torch.ones(3, 1, dtype=torch.bool), real.repeat_interleave(BANDS, 1)], dim=1)
    attention = torch.rand(3, STEPS * BANDS, generator=generator)
    return tokens, mask, attention


def make(name: str) -> Pooling:
    torch.manual_seed(1)
    pooling = Pooling(name, DIM, BANDS)
    for parameter in pooling.parameters():
        torch.nn.init.normal_(parameter)
    return pooling


def reference(pooling: Pooling, tokens: torch.Tensor, attention: torch.Tensor, steps: int) -> torch.Tensor:
    """One clip [1 + N, D], in loops over its real tokens."""
    cls, patches = tokens[0], [tokens[1 + i] for i in range(steps * BANDS)]
    mean = sum(patches) / len(patches)
    if pooling.name == "cls":
        return cls
    if pooling.name == "mean":
        return mean
    if pooling.name == "mean_cls":
        return (cls + sum(patches)) / (1 + len(patches))
    if pooling.name == "cls_mean_concat":
        return torch.cat([cls, mean])
    if pooling.name == "max":
        return torch.stack([max(patch[d] for patch in patches) for d in range(DIM)])
    if pooling.name == "freq_concat":
        rows = [torch.cat([patches[t * BANDS + f] for f in range(BANDS)]) for t in range(steps)]
        return sum(rows) / steps
    if pooling.name == "attention_score":
        weights = attention[: len(patches)]
        return sum(w * patch for w, patch in zip(weights, patches, strict=True)) / weights.sum()
    everything = [cls, *patches]
    scores = torch.stack([pooling.score(token)[0] for token in everything]).exp()
    return sum(s * token for s, token in zip(scores, everything, strict=True)) / scores.sum()


@pytest.mark.parametrize("name", POOLINGS)
def test_equals_the_slow_reference(name, batch):
    tokens, mask, attention = batch
    pooling = make(name)
    pooled = pooling(tokens, mask, attention)
    assert pooled.shape == (3, pooling.out_dim)
    for row, steps in enumerate(REAL_STEPS):
        expected = reference(pooling, tokens[row], attention[row], steps)
        torch.testing.assert_close(pooled[row], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", POOLINGS)
def test_padding_has_no_effect(name, batch):
    tokens, mask, attention = batch
    pooling = make(name)
    other = torch.where(mask.unsqueeze(-1), tokens, torch.full_like(tokens, 1e4))
    torch.testing.assert_close(pooling(other, mask, attention), pooling(tokens, mask, attention))


@pytest.mark.parametrize("name", POOLINGS)
def test_no_mask_means_all_real(name, batch):
    tokens, mask, attention = batch
    pooling = make(name)
    torch.testing.assert_close(pooling(tokens[:1], None, attention[:1]), pooling(tokens[:1], mask[:1], attention[:1]))


@pytest.mark.parametrize("name", POOLINGS)
def test_gradient_reaches_real_tokens_only(name, batch):
    tokens, mask, attention = batch
    tokens = tokens.clone().requires_grad_()
    make(name)(tokens, mask, attention).square().sum().backward()
    assert (tokens.grad[~mask] == 0).all()
    assert (tokens.grad[mask] != 0).any()


def test_learned_attention_starts_as_the_mean(batch):
    tokens, mask, _ = batch
    torch.testing.assert_close(
        Pooling("attention", DIM, BANDS)(tokens, mask), Pooling("mean_cls", DIM, BANDS)(tokens, mask)
    )


def test_only_learned_attention_has_parameters():
    assert [name for name in POOLINGS if list(Pooling(name, DIM, BANDS).parameters())] == ["attention"]


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="expected one of cls, mean"):
        Pooling("median", DIM, BANDS)


def test_attention_score_asks_for_scores(batch):
    with pytest.raises(ValueError, match="want_cls_attention=True"):
        make("attention_score")(batch[0])
