"""The snippets of README.md, run as they stand there."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile

README = Path(__file__).resolve().parents[2] / "README.md"
MAX_LINES = 15


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)


@pytest.fixture
def sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The newcomer's folder: `sounds/` of two labels, where the commands are called."""
    noise = np.random.default_rng(0)
    for label, hz in (("dog", 300), ("rain", 1200)):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for number in range(12):
            tone = np.sin(2 * np.pi * (hz + 20 * number) * np.arange(16000) / 16000)
            sound = 0.3 * tone + 0.05 * noise.standard_normal(16000)
            soundfile.write(tmp_path / "sounds" / label / f"{number}.wav", sound.astype(np.float32), 16000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.timeout(900)
def test_the_whole_line_in_python(ray_cluster: None, sounds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for block in python_blocks() if "train(" in block]
    assert len(block.strip().splitlines()) <= MAX_LINES
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})
    map_text, uri = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert 0 < float(map_text) <= 1 and uri == "dog/1.wav"
    assert (sounds / "runs" / "index" / "LATEST").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_the_steps_in_a_shell(page: str, ray_cluster: None, sounds: Path) -> None:
    """Every line that needs neither a service, a listing nor a second Ray, as it stands on the page."""
    text = (README.parent / page).read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
    done = []
    for line in lines:
        words = shlex.split(line)
        if words[:1] != ["python"] or not words[1].startswith("ray_jobs/") or "sounds.csv" in line or "--check" in line:
            continue
        job = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        assert job.main(words[2:]) == 0, line
        done.append(words[1])
    assert {"ray_jobs/train.py", "ray_jobs/embed_corpus.py", "ray_jobs/build_index.py"} <= set(done)
    assert (sounds / "runs" / "index" / "LATEST").exists()
