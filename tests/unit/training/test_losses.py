"""Every loss against a slow reference written with loops, its edge cases, and its behaviour at extreme temperature."""

import math

import pytest
import torch
import torch.nn.functional as F

from audiomae.training import losses
from audiomae.training.losses import UNLABELLED


def unit(rows: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    z = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(z, dim=1)


def slow_info_nce(z, groups, temperature, positives):
    terms = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        same = [j for j in others if groups[j] == groups[i]]
        if not same:
            continue
        total = sum(math.exp(float(z[i] @ z[j]) / temperature) for j in others)
        ratios = [math.exp(float(z[i] @ z[j]) / temperature) / total for j in same]
        if positives == "mean":
            terms.append(-sum(math.log(r) for r in ratios) / len(ratios))
        else:
            terms.append(-math.log(sum(ratios)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("positives", ["mean", "sum"])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_info_nce_matches_loops(positives, temperature):
    z, groups = unit(9), torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 1])
    expected = slow_info_nce(z, groups.tolist(), temperature, positives)
    assert float(losses.info_nce(z, groups, temperature, positives)) == pytest.approx(expected, rel=1e-5)


def test_info_nce_forms_agree_for_two_views():
    z, groups = unit(8), torch.arange(4).repeat(2)
    assert losses.info_nce(z, groups, positives="mean") == pytest.approx(losses.info_nce(z, groups, positives="sum"))


@pytest.mark.parametrize("positives", ["mean", "sum"])
def test_info_nce_survives_temperatures_that_overflow_exp(positives):
    z = unit(6).requires_grad_()
    loss = losses.info_nce(z, torch.tensor([0, 0, 1, 1, 2, 3]), temperature=1e-3, positives=positives)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("positives", ["mean", "sum"])
def test_info_nce_without_any_positive_is_zero_with_zero_gradient(positives):
    z = unit(4).requires_grad_()
    loss = losses.info_nce(z, torch.arange(4), positives=positives)
    loss.backward()
    assert float(loss.detach()) == 0 and float(z.grad.abs().max()) == 0


def test_info_nce_in_half_precision_input_is_computed_in_float32():
    z, groups = unit(16, 32), torch.arange(8).repeat(2)
    exact = float(losses.info_nce(z.float().half().float(), groups, 0.02))
    assert float(losses.info_nce(z.float().half(), groups, 0.02)) == pytest.approx(exact, rel=1e-6)


def test_contrastive_groups_fall_back_to_the_clip_where_there_is_no_label():
    clips = torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.equal(losses.contrastive_groups(clips, None), clips)
    groups = losses.contrastive_groups(clips, torch.tensor([1, 1, UNLABELLED, 1, 1, UNLABELLED]))
    same = groups[:, None] == groups[None, :]
    assert same[0, 1] and same[0, 4] and same[2, 5] and not same[0, 2] and not same[1, 5]


def test_uniformity_matches_pdist():
    z = unit(12)
    expected = torch.pdist(z).pow(2).mul(-2).exp().mean().log()
    assert float(losses.uniformity(z)) == pytest.approx(float(expected), rel=1e-5)


def test_uniformity_has_a_finite_gradient_for_equal_rows():
    z = unit(1).repeat(5, 1).requires_grad_()
    loss = losses.uniformity(z)
    loss.backward()
    assert float(loss) == pytest.approx(0.0, abs=1e-6) and torch.isfinite(z.grad).all()


def test_alignment_is_the_mean_squared_distance():
    a, b = unit(5), unit(5, seed=1)
    expected = sum(float((x - y).pow(2).sum()) for x, y in zip(a, b, strict=True)) / 5
    assert float(losses.alignment(a, b)) == pytest.approx(expected, rel=1e-6)


def slow_cross_entropy(logits, target):
    terms = []
    for row, wanted in zip(logits.tolist(), target.tolist(), strict=True):
        if any(wanted):
            total = math.log(sum(math.exp(v) for v in row))
            terms.append(sum(total - v for v, w in zip(row, wanted, strict=True) if w) / sum(wanted))
    return sum(terms) / len(terms)


def test_clap_lite_matches_loops_with_several_clips_per_class():
    z, classes = unit(6), unit(4, seed=1) * 3
    labels, log_scale = torch.tensor([0, 0, 2, 1, 2, 0]), torch.tensor(1.3)
    logits = math.exp(1.3) * z @ (classes / 3).T
    target = labels[:, None] == torch.arange(4)
    expected = (slow_cross_entropy(logits, target) + slow_cross_entropy(logits.T, target.T)) / 2
    assert float(losses.clap_lite(z, classes, labels, log_scale)) == pytest.approx(expected, rel=1e-5)


def test_clap_lite_leaves_unlabelled_rows_out():
    z, classes, log_scale = unit(6), unit(4, seed=1), torch.tensor(1.0)
    labels = torch.tensor([0, UNLABELLED, 2, 1, UNLABELLED, 0])
    keep = labels != UNLABELLED
    expected = losses.clap_lite(z[keep], classes, labels[keep], log_scale)
    assert float(losses.clap_lite(z, classes, labels, log_scale)) == pytest.approx(float(expected))
    nothing = losses.clap_lite(z.requires_grad_(), classes, torch.full((6,), UNLABELLED), log_scale)
    nothing.backward()
    assert float(nothing) == 0 and torch.isfinite(z.grad).all()


def test_clap_is_clip_when_captions_differ():
    audio, text, log_scale = unit(5), unit(5, seed=1), torch.tensor(2.0)
    logits = math.exp(2.0) * audio @ text.T
    diagonal = torch.arange(5)
    expected = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    assert float(losses.clap(audio, text, torch.arange(5), log_scale)) == pytest.approx(float(expected), rel=1e-5)


def test_clap_spreads_its_target_over_equal_captions():
    captions = torch.tensor([7, 3, 7, 7])
    audio, text = unit(4), unit(2, seed=1)[[0, 1, 0, 0]]
    logits = math.exp(2.0) * audio @ text.T
    target = captions[:, None] == captions[None, :]
    expected = (slow_cross_entropy(logits, target) + slow_cross_entropy(logits.T, target)) / 2
    assert float(losses.clap(audio, text, captions, torch.tensor(2.0))) == pytest.approx(expected, rel=1e-5)


def test_clap_pulls_every_clip_that_shares_a_caption_equally():
    """One-hot targets would give one clip per row the pull and make negatives of the others."""
    text = torch.eye(8, dtype=torch.float64)[[0, 0, 1]]
    audio = unit(1).repeat(3, 1).requires_grad_()
    losses.clap(audio, text, torch.tensor([5, 5, 6]), torch.tensor(1.0)).backward()
    pull = -(audio.grad * text).sum(dim=1)
    assert float(pull[0]) == pytest.approx(float(pull[1])) and float(pull.min()) > 0


def test_clap_leaves_clips_without_a_caption_out():
    audio, text, log_scale = unit(4), unit(4, seed=1), torch.tensor(2.0)
    captions = torch.tensor([3, UNLABELLED, 5, 3])
    keep = captions != UNLABELLED
    expected = losses.clap(audio[keep], text[keep], captions[keep], log_scale)
    assert float(losses.clap(audio, text, captions, log_scale)) == pytest.approx(float(expected))


@pytest.mark.parametrize(("log_scale", "expected"), [(-3.0, 1.0), (math.log(20), 20.0), (50.0, 100.0)])
def test_logit_scale_is_clamped(log_scale, expected):
    assert float(losses.clamped_scale(torch.tensor(log_scale))) == pytest.approx(expected, rel=1e-5)


def test_initial_log_scale_inverts_the_temperature():
    assert float(losses.clamped_scale(torch.tensor(losses.initial_log_scale(0.07)))) == pytest.approx(
        1 / 0.07, rel=1e-5
    )


def slow_triplet(z, labels, margin):
    distance = [[float((a - b).pow(2).sum()) for b in z] for a in z]
    terms = []
    for a in range(len(z)):
        negatives = [distance[a][n] for n in range(len(z)) if labels[n] != labels[a]]
        for p in range(len(z)):
            if p == a or labels[p] != labels[a] or not negatives:
                continue
            farther = [d for d in negatives if d > distance[a][p]]
            chosen = min(farther) if farther else max(negatives)
            terms.append(max(0.0, distance[a][p] - chosen + margin))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("seed", range(4))
def test_triplet_matches_loops(seed):
    z, labels = unit(10, 4, seed), torch.tensor([0, 1, 0, 2, 1, 1, 0, 3, 2, 2])
    expected = slow_triplet(z, labels.tolist(), 0.3)
    assert float(losses.triplet_semi_hard(z, labels, 0.3)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [UNLABELLED] * 3, [0, 0, UNLABELLED]])
def test_triplet_without_a_triplet_is_zero_with_a_finite_gradient(labels):
    z = unit(3).requires_grad_()
    loss = losses.triplet_semi_hard(z, torch.tensor(labels))
    loss.backward()
    assert float(loss) == 0 and torch.isfinite(z.grad).all()
