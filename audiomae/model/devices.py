"""Where an encoder computes, and in which precision: the one rule for both, on every machine."""

import torch

PRECISIONS = ("float32", "bfloat16")


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` = CUDA when there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def pick_precision(precision: str, device: torch.device) -> str:
    """`float32` or `bfloat16` as asked; `auto` is bfloat16 on a GPU with tensor cores for it, float32 everywhere else.

    A CPU computes in bfloat16 only when asked to, whatever instructions it has: results must not depend on which
    machine a job happened to run on (1.5e-2 in a HEAR embedding between two CPUs, for 1.2 times the speed).

    Raises:
        ValueError: any other name.
    """
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" and native_bfloat16(device) else "float32"
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected auto, float32 or bfloat16, got {precision!r}")
    return precision


def native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware: tensor cores, AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
