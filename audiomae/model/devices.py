"""Where an encoder computes, and in which precision."""

import torch


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` = CUDA when there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`float32`, `bfloat16`, or `auto` = bfloat16 where the device computes it natively."""
    if dtype == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    try:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    except KeyError:
        raise ValueError(f"dtype: expected auto, float32 or bfloat16, got {dtype!r}") from None


def native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run in hardware: tensor cores, AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
