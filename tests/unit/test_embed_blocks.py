"""How the shards of a plan are handed to Ray Data."""

import pytest

from audiomae.embedding.plan import ShardEntry
from ray_jobs.embed.execution import blocks_of


@pytest.mark.parametrize(("shards", "workers", "most"), [(1, 2, 16), (200, 2, 16), (10_000, 2, 16), (3_000, 64, 16)])
def test_every_shard_is_in_one_block_in_order(shards: int, workers: int, most: int) -> None:
    entries = [ShardEntry(name=f"{number:06d}", file="f", group=number, items=1) for number in range(shards)]
    blocks = list(blocks_of(entries, workers, most))
    assert [ShardEntry.model_validate_json(text) for block in blocks for text in block] == entries
    sizes = [len(block) for block in blocks]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= most and sizes[-1] == 1
    if shards < 64:
        assert set(sizes) == {1}
    if shards == 10_000:
        assert sizes[0] == most and len(blocks) < 800
    assert all(len(block) == 1 for block in blocks_of(entries, workers, 1))


@pytest.mark.parametrize(("shards", "files", "largest"), [(200, 164, 1), (2_000, 40, 6), (16_384, 164, 8)])
def test_large_shards_go_alone_while_they_are_few(shards: int, files: int, largest: int) -> None:
    entries = [ShardEntry(name=f"{number:06d}", file="f", group=number, items=files) for number in range(shards)]
    entries[7] = entries[7].model_copy(update={"items": 10_000})
    blocks = list(blocks_of(entries, 2, 256))
    assert [ShardEntry.model_validate_json(text) for block in blocks for text in block] == entries
    assert max(map(len, blocks)) == largest and len(blocks) < 3_000
    assert [entries[7].model_dump_json()] in blocks
