"""The snippets of README.md, run as they stand there."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

README = Path(__file__).resolve().parents[2] / "README.md"
MAX_LINES = 15


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)


@pytest.mark.timeout(900)
def test_the_whole_line_in_python(ray_cluster, tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for block in python_blocks() if "train(" in block]
    assert len(block.strip().splitlines()) <= MAX_LINES
    noise = np.random.default_rng(0)
    for label, hz in (("dog", 300), ("rain", 1200)):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for number in range(12):
            tone = np.sin(2 * np.pi * (hz + 20 * number) * np.arange(16000) / 16000)
            sound = 0.3 * tone + 0.05 * noise.standard_normal(16000)
            soundfile.write(tmp_path / "sounds" / label / f"{number}.wav", sound.astype(np.float32), 16000)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})
    map_text, uri = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert 0 < float(map_text) <= 1 and uri == "dog/1.wav"
    assert (tmp_path / "runs" / "index" / "LATEST").exists()
