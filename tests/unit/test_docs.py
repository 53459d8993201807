"""What the pages quote is what the code says: commands parse, links lead somewhere, messages exist."""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from audiomae import client
from audiomae.artifacts.__main__ import _parser as artifacts_parser
from ray_jobs import (
    ablation,
    build_index,
    compare,
    demo,
    demo_queries,
    embed_corpus,
    evaluate_retrieval,
    pipeline,
    train,
)
from serve.arguments import ServeArgs

ROOT = Path(client.__file__).resolve().parent.parent
JOBS = (train, embed_corpus, build_index, evaluate_retrieval, compare, pipeline, demo, demo_queries, ablation)
COMMANDS = {job.COMMAND.script: job.COMMAND for job in JOBS}
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
WRITTEN = [page for page in PAGES if page.name not in ("log.md", "config.md", "api.md")]


def commands(page: Path) -> Iterator[str]:
    """Every command of the page: lines of its shell blocks, and code within its sentences."""
    text = page.read_text()
    for block in re.findall(r"```(?:bash)?\n(.*?)```", text, flags=re.S):
        yield from (line.partition(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
    for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)):
        yield " ".join(code.split())


def stated(page: Path, start: str) -> list[list[str]]:
    """The words after `start` of each command that has it, but of those that leave something out."""
    found = [line[line.index(start) + len(start) :] for line in commands(page) if start in line]
    return [shlex.split(line) for line in found if "..." not in line and line.strip()]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_command_of_the_pages_is_understood(page: Path) -> None:
    for script, command in COMMANDS.items():
        for words in stated(page, f"python {script}"):
            command.parse(words)
    for words in stated(page, "serve run serve.app:build"):
        ServeArgs(**dict(word.strip("[]").split("=", 1) for word in words))
    for words in stated(page, "python -m audiomae.artifacts"):
        artifacts_parser().parse_args([word.strip("[]") for word in words if "KEEP" not in word and word != "N]"])


def test_the_pages_show_the_four_steps_and_more() -> None:
    shown = {script for script in COMMANDS for page in WRITTEN if stated(page, f"python {script}")}
    assert {f"ray_jobs/{name}.py" for name in ("train", "embed_corpus", "build_index", "compare")} <= shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@cache
def said() -> str:
    """Every text of the code, its variable parts as NUL, one a line."""
    texts = []
    for folder in ("audiomae", "ray_jobs", "serve"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    texts.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


def test_messages_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [" ".join(text.split()) for text in re.findall(r"\*\*`([^`]+)`\*\*", page)]
    assert len(quoted) > 30
    parts = [part.strip(" ;,:()") for text in quoted for part in text.split("...")]
    assert [part for part in parts if part not in said()] == []
