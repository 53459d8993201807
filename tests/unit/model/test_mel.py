"""The mel bank: torchaudio's, up to rounding, and the same bits whatever instructions the CPU has."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torchaudio

from audiomae.model.mel import htk_bank

BANKS = [
    (201, 50.0, 8000.0, 80, 16_000),
    (513, 20.0, 16_000.0, 64, 32_000),
    (513, 20.0, 16_000.0, 128, 32_000),
    (1025, 20.0, 22_050.0, 96, 44_100),
]
SHOW = f"""
import hashlib
from audiomae.model.mel import htk_bank
for arguments in {BANKS}:
    print(hashlib.sha256(htk_bank(*arguments).tobytes()).hexdigest())
"""


@pytest.mark.parametrize("arguments", BANKS)
def test_equals_torchaudio_up_to_rounding(arguments):
    reference = torchaudio.functional.melscale_fbanks(*arguments).numpy()
    bank = htk_bank(*arguments)
    assert (bank.shape, bank.dtype) == (reference.shape, reference.dtype)
    assert np.abs(bank - reference).max() < 2e-5


@pytest.mark.parametrize("variables", [{"ATEN_CPU_CAPABILITY": "default"}, {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3"}])
def test_is_the_same_with_older_instructions(variables):
    done = subprocess.run(
        [sys.executable, "-c", SHOW], env=os.environ | variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [hashlib.sha256(htk_bank(*arguments).tobytes()).hexdigest() for arguments in BANKS]
