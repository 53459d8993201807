"""Random masking: how many, which, and never padding before real patches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from audiomae.model.masking import random_masking

MODES = ["unstructured", "time", "frequency", "time+frequency"]


def draw(ratio, mode="unstructured", grid=(20, 5), real_steps=(20, 20), seed=0):
    steps = torch.arange(grid[0]) < torch.tensor(real_steps)[:, None]
    patch_mask = steps.repeat_interleave(grid[1], dim=1)
    generator = torch.Generator().manual_seed(seed)
    return patch_mask, random_masking(patch_mask, grid, ratio, mode, generator)


@settings(max_examples=80, deadline=None)
@given(
    ratio=st.floats(0.5, 0.9),
    mode=st.sampled_from(MODES),
    real=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_every_clip_keeps_its_share_of_real_patches(ratio, mode, real, seed):
    patch_mask, drawn = draw(ratio, mode, real_steps=real, seed=seed)
    for row, steps in enumerate(real):
        count = steps * 5
        kept = max(1, int(count * (1 - ratio) + 1e-4))
        seen = drawn.ids_keep[row][drawn.visible[row]]
        assert len(seen) == kept == len(set(seen.tolist()))
        assert patch_mask[row, seen].all(), "padding was kept"
        hidden = drawn.mask[row].bool()
        assert hidden.sum() == count - kept and not hidden[~patch_mask[row]].any() and not hidden[seen].any()


@pytest.mark.parametrize("mode", MODES)
def test_restore_inverts_the_shuffle(mode):
    _, drawn = draw(0.75, mode)
    order = drawn.ids_restore.argsort(1)
    assert (order[:, : drawn.ids_keep.shape[1]] == drawn.ids_keep).all()
    assert (order.gather(1, drawn.ids_restore) == torch.arange(100)).all()


def test_time_hides_whole_steps():
    _, drawn = draw(0.75, "time")
    visible_per_step = (1 - drawn.mask).unflatten(1, (20, 5)).sum(2)
    assert ((visible_per_step == 5).sum(1) == 5).all() and ((visible_per_step == 0).sum(1) == 15).all()


def test_frequency_hides_whole_bands():
    _, drawn = draw(0.6, "frequency")
    visible_per_band = (1 - drawn.mask).unflatten(1, (20, 5)).sum(1)
    assert ((visible_per_band == 20).sum(1) == 2).all() and ((visible_per_band == 0).sum(1) == 3).all()


def test_time_and_frequency_leave_a_rectangle():
    _, drawn = draw(0.75, "time+frequency", grid=(20, 20))
    visible = (1 - drawn.mask).bool().unflatten(1, (20, 20))
    for clip in visible:
        steps, bands = clip.any(1), clip.any(0)
        assert steps.sum() == bands.sum() == 10 and (clip == steps[:, None] & bands[None]).all()


def test_official_count():
    _, drawn = draw(0.8, grid=(50, 5), real_steps=(50,))
    assert drawn.ids_keep.shape[1] == 50


def test_same_generator_same_draw():
    assert (draw(0.75, seed=3)[1].ids_keep == draw(0.75, seed=3)[1].ids_keep).all()
    assert (draw(0.75, seed=3)[1].ids_keep != draw(0.75, seed=4)[1].ids_keep).any()


@pytest.mark.parametrize("ratio", [1.0, -0.1])
def test_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match="0 <= ratio < 1"):
        draw(ratio)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="unstructured, time, frequency"):
        draw(0.75, "diagonal")
