"""Intervals that cover, tests that tell a real difference from noise, corrections as published."""

import numpy as np
import pytest

from audiomae.evaluation.compare import bootstrap_mean, holm, paired_test


def test_bootstrap_interval_agrees_with_the_normal_one():
    values = np.random.default_rng(0).normal(0.6, 0.2, 400)
    interval = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.004)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.004)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        interval = bootstrap_mean(rng.normal(0, 1, 60), resamples=300, seed=seed)
        covered += interval.low <= 0 <= interval.high
    assert 175 <= covered <= 199


def test_clusters_widen_the_interval_and_keep_the_mean():
    rng = np.random.default_rng(2)
    values = np.repeat(rng.normal(size=40), 10) + rng.normal(0, 0.01, 400)
    alone, clustered = bootstrap_mean(values), bootstrap_mean(values, clusters=np.repeat(np.arange(40), 10))
    assert clustered.mean == pytest.approx(alone.mean)
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)


def test_nan_is_left_out_and_constants_need_no_resampling():
    assert bootstrap_mean([1.0, np.nan, 1.0]).as_dict() == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert bootstrap_mean([np.nan]).mean == 0.0


def test_a_real_difference_is_found_and_noise_is_not():
    rng = np.random.default_rng(3)
    base = rng.uniform(0, 1, 300)
    better = paired_test(base + 0.03 + rng.normal(0, 0.05, 300), base)
    assert better.p_value < 0.001 and better.low > 0 and better.wins > better.losses
    noise = paired_test(base + rng.normal(0, 0.05, 300), base)
    assert noise.p_value > 0.05 and noise.low < 0 < noise.high


def test_few_pairs_are_enumerated_exactly():
    # 5 positive differences: 2 of 32 sign patterns are as extreme
    assert paired_test([1.0, 2, 3, 4, 5], [0.0] * 5).p_value == pytest.approx(2 / 32)


def test_the_direction_only_changes_the_sign():
    rng = np.random.default_rng(4)
    a, b = rng.uniform(size=50), rng.uniform(size=50)
    one, other = paired_test(a, b), paired_test(b, a)
    assert one.difference == pytest.approx(-other.difference)
    assert (one.wins, one.losses) == (other.losses, other.wins)
    assert one.p_value == pytest.approx(other.p_value, abs=0.02)


def test_identical_runs_differ_by_nothing():
    same = paired_test([0.5, 0.7], [0.5, 0.7])
    assert (same.difference, same.p_value, same.ties) == (0.0, 1.0, 2)


def test_clustered_noise_is_not_mistaken_for_a_difference():
    rng = np.random.default_rng(5)
    recording = np.repeat(np.arange(8), 50)
    shift = np.array([0.3, -0.2, 0.25, -0.1, 0.2, -0.15, 0.1, 0.05])[recording]
    base = rng.uniform(size=400)
    assert paired_test(base + shift, base).p_value < 0.01
    assert paired_test(base + shift, base, clusters=recording).p_value > 0.2


def test_holm_step_down():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_mismatched_runs_are_refused():
    with pytest.raises(ValueError, match="equal length"):
        paired_test([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no query has a score in both"):
        paired_test([np.nan], [1.0])
