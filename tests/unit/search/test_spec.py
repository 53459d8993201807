"""The choice of an index: by size, within memory, or a clear refusal."""

import pytest

from audiomae.errors import UserError
from audiomae.search.spec import choose


@pytest.mark.parametrize(
    ("rows", "memory_gib", "factory"),
    [
        (1, None, ""),
        (20_000, 0.001, ""),
        (20_001, None, "IVF512,SQfp16"),
        (1_000_000, None, "IVF4096,SQfp16"),
        (1_000_000, 0.5, "IVF4096,SQ8"),
        (1_000_000, 0.25, "IVF4096,SQ4"),
    ],
)
def test_choice_fits_size_and_memory(rows: int, memory_gib: float | None, factory: str) -> None:
    spec = choose(rows, 384, memory_gib)
    assert spec.factory == factory
    if memory_gib and factory:
        assert rows * spec.bytes_in_memory + spec.nlist * 384 * 4 <= memory_gib * 2**30


def test_choice_says_how_much_memory_it_needs() -> None:
    with pytest.raises(UserError, match=r"need at least 0.19 GiB.*got --memory-gib 0.1"):
        choose(1_000_000, 384, 0.1)
