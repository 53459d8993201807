"""Batches joined across data-parallel ranks, with gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of data-parallel ranks; 1 when torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 when torch.distributed is not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(rows: Tensor) -> Tensor:
    """Concatenate every rank's rows in rank order, without gradient.

    Args:
        rows: [B, ...], the same shape on every rank.

    Returns:
        [W * B, ...]; `rows` itself when there is one rank.
    """
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def gather_with_grad(rows: Tensor) -> Tensor:
    """Concatenate every rank's rows in rank order, so that a loss over all of them trains every rank's encoder.

    Each rank must compute the same loss from the result. DistributedDataParallel then averages parameter gradients
    over ranks, and the average equals the gradient of one process that held the joined batch: the backward sums the
    gradients which all W ranks have for this rank's rows. They are equal, so the sum is W times the local one and
    needs no communication.

    Args:
        rows: float[B, ...], the same shape on every rank.

    Returns:
        float[W * B, ...].
    """
    if world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        return gather(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        start = rank() * ctx.rows
        return grads[0][start : start + ctx.rows] * world_size()
