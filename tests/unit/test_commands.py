"""The command line of every job: light enough to answer at once, every setting described, one reference of them all."""

import subprocess
import sys
from pathlib import Path

import pytest

from audiomae.config import config_keys
from audiomae.errors import ConfigError
from ray_jobs import (
    ablation,
    build_index,
    compare,
    demo,
    demo_queries,
    embed_corpus,
    evaluate_retrieval,
    pipeline,
    reference,
    train,
)

JOBS = (train, embed_corpus, build_index, evaluate_retrieval, compare, pipeline, demo, demo_queries, ablation)
HEAVY = (
    "torch",
    "torchaudio",
    "timm",
    "ray",
    "faiss",
    "pyarrow",
    "numpy",
    "pandas",
    "librosa",
    "transformers",
    "fsspec",
)
LIGHT = """
import contextlib, importlib, io, sys
import audiomae
for name in sys.argv[2:]:
    job = importlib.import_module(name)
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        job.main(["--help"])
print(" ".join(name for name in sys.argv[1].split(",") if name in sys.modules))
"""


def test_help_and_the_package_load_nothing_heavy() -> None:
    names = [job.__name__ for job in JOBS]
    command = [sys.executable, "-c", LIGHT, ",".join(HEAVY), *names]
    found = subprocess.run(command, cwd=Path(train.__file__).parents[1], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_every_setting_says_what_it_is(job) -> None:
    unsaid = [key.name for key in config_keys(job.COMMAND.config) if not key.field.description]
    assert not unsaid, "give these fields a description, it is their help text"


@pytest.mark.parametrize("job", [job for job in JOBS if job is not demo], ids=lambda job: job.__name__)
def test_what_is_missing_is_named_with_an_example(job) -> None:
    for argv in ([], ["--k", "1"] if job is demo_queries else ["--device" if job is embed_corpus else "--seed", "1"]):
        with pytest.raises(ConfigError) as error:
            job.main(argv)
        assert f"{job.COMMAND.script} needs --" in str(error.value)
        assert f"for example: python {job.COMMAND.script} " in str(error.value)


def test_train_alone_names_the_recipes() -> None:
    with pytest.raises(ConfigError) as error:
        train.main([])
    for recipe in (Path(train.__file__).parent / "recipes").glob("*.yaml"):
        line = next(line for line in str(error.value).splitlines() if line.strip().startswith(recipe.name))
        assert len(line.split(maxsplit=1)[1]) > 10, "its first line says what it is for"


@pytest.mark.parametrize(
    ("job", "name", "meant"),
    [
        (train, "mask_ratio", "encoder.backbone.mask_ratio"),
        (train, "contrast_weight", "objective.contrastive"),
        (train, "contrast_loss_weight", "objective.contrastive"),
        (train, "mae_loss_weight", "objective.mae"),
        (train, "learning_rate", "optim.lr"),
        (train, "img_size", "encoder.backbone.img_size"),
        (train, "patch_size", "encoder.backbone.patch_size"),
        (train, "num_mel_bins", "encoder.features.n_mels"),
        (train, "optim.learning_rate", "optim.lr"),
        (train, "model.depth", "encoder.backbone.depth"),
        (train, "warmup_epoch", "optim.warmup_epochs"),
        (pipeline, "per_file", "embed.per_file"),
        (pipeline, "memory_gib", "index.memory_gib"),
        (build_index, "recal", "recall"),
    ],
)
def test_a_key_at_the_wrong_place_leads_to_the_right_one(job, name: str, meant: str) -> None:
    required = [key.name for key in config_keys(job.COMMAND.config) if key.field.is_required() and "." not in key.name]
    needed = [word for key in required for word in (f"--{key}", "x")]
    with pytest.raises(ConfigError) as error:
        job.COMMAND.parse([*needed, "--set", f"{name}=1"])
    assert f"unknown config key '{name}'" in str(error.value) and f"'{meant}'" in str(error.value)


@pytest.mark.parametrize(("given", "size"), [("384", (384, 384)), ("[200, 80]", (200, 80))])
def test_one_number_is_a_square(given: str, size: tuple[int, int]) -> None:
    flags = ["--corpus", "c", "--storage", "s", "--name", "n", "--n-mels", str(size[1])]
    config = train.COMMAND.parse([*flags, "--set", f"encoder.backbone.img_size={given}", "--patch-size", "4"])
    assert config.encoder.backbone.img_size == size and config.encoder.backbone.patch_size == (4, 4)


def test_the_reference_has_every_key_and_is_what_the_code_says() -> None:
    page = reference.config_page()
    keys = [key for job in JOBS for key in config_keys(job.COMMAND.config)]
    assert all(f"| `{key.name}` |" in page for key in keys) and len({key.name for key in keys}) > 138
    assert (reference.DOCS / "config.md").read_text() == page, "run: python -m ray_jobs.reference"


def test_the_interface_page_is_what_the_docstrings_say() -> None:
    assert (reference.DOCS / "api.md").read_text() == reference.api_page(), "run: python -m ray_jobs.reference"


def test_serve_run_starts_without_torch() -> None:
    code = "import sys, serve.app; print([name for name in ('torch', 'librosa', 'sklearn') if name in sys.modules])"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=Path(train.__file__).parents[1], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["[]"]
