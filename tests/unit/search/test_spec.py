"""The choice of an index: by size, as asked, within memory, or a clear refusal."""

import pytest

from audiomae.errors import ConfigError, UserError
from audiomae.search.spec import choose


@pytest.mark.parametrize(
    ("rows", "asked", "factory", "kind"),
    [
        (1, None, "", "flat"),
        (20_000, None, "", "flat"),
        (20_001, None, "IVF128,RaBitQfs", "ivf"),
        (1_000_000, None, "IVF1024,RaBitQfs", "ivf"),
        (1_000_000, "Flat", "", "flat"),
        (1_000_000, "IVF100,SQ8", "IVF100,SQ8", "ivf"),
        (1_000_000, "IVF,SQfp16", "IVF1024,SQfp16", "ivf"),
        (1_000, "HNSW32,SQ8", "HNSW32,SQ8", "hnsw"),
    ],
)
def test_choice_by_size_or_as_asked(rows: int, asked: str | None, factory: str, kind: str) -> None:
    spec = choose(rows, 384, factory=asked)
    assert (spec.factory, spec.kind) == (factory, kind)


def test_a_million_vectors_take_less_than_90_bytes_each() -> None:
    assert choose(1_000_000, 384).bytes_in_memory <= 90


def test_choice_says_how_much_memory_it_needs() -> None:
    with pytest.raises(UserError, match=r"need at least 0.06 GiB.*got --memory-gib 0.05"):
        choose(1_000_000, 384, 0.05)
    assert choose(1_000_000, 384, 0.1).factory == "IVF1024,RaBitQfs"


@pytest.mark.parametrize("factory", ["IVF", "PQ8", "IVF0x,SQ8", "HNSW", "IVF16,SQ8,RFlat", ""])
def test_what_cannot_be_built_is_refused(factory: str) -> None:
    with pytest.raises(ConfigError, match="expected Flat, IVF<lists>"):
        choose(1_000_000, 384, factory=factory or "?")
