"""Write docs/config.md (every key of every config) and docs/api.md (every public name) from the code itself.

python -m ray_jobs.reference          # write both
python -m ray_jobs.reference --check  # exit 1 when one of them is not what the code says
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from audiomae.cli import EXIT_FAILED, EXIT_OK
from audiomae.config import Key, config_keys
from ray_jobs import configs

DOCS = Path(__file__).resolve().parent.parent / "docs"
AGAIN = "<!-- written by `python -m ray_jobs.reference`: change the code, not this file -->"
Section = tuple[str, str, type[BaseModel], tuple[type[BaseModel], ...]]
CONFIG_SECTIONS: tuple[Section, ...] = (
    ("Training", "`ray_jobs/train.py`", configs.TrainConfig, ()),
    ("Embedding", "`ray_jobs/embed_corpus.py`", configs.EmbedConfig, ()),
    ("Building an index", "`ray_jobs/build_index.py`", configs.BuildConfig, ()),
    ("Evaluation", "`ray_jobs/evaluate_retrieval.py`", configs.EvaluateConfig, ()),
    ("Comparing poolings", "`ray_jobs/compare.py`", configs.CompareConfig, ()),
    ("All in a row", "`ray_jobs/pipeline.py`", configs.PipelineConfig, (configs.Recipe,)),
    ("Demo", "`ray_jobs/demo.py`", configs.DemoConfig, (configs.StageOptions,)),
    ("Queries to a running service", "`ray_jobs/demo_queries.py`", configs.QueryConfig, ()),
    ("Ablation", "`ray_jobs/ablation.py`", configs.AblationConfig, (configs.Recipe,)),
)
API: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("audiomae", ("AudioEncoder", "AudioIndex")),
    ("audiomae.search.hits", ("Hits",)),
    ("audiomae.model.hear", ("load_model", "get_scene_embeddings", "get_timestamp_embeddings")),
    ("audiomae.model.mteb", ("MTEBAudioEncoder",)),
    ("ray_jobs.train", ("train",)),
    ("ray_jobs.embed_corpus", ("embed",)),
    ("ray_jobs.build_index", ("build",)),
    ("ray_jobs.evaluate_retrieval", ("evaluate",)),
    ("ray_jobs.compare", ("compare",)),
    ("ray_jobs.pipeline", ("pipeline",)),
    ("ray_jobs.ablation", ("ablate",)),
    (
        "ray_jobs.configs",
        ("TrainResult", "EmbedResult", "Evaluation", "Comparison", "PipelineResult", "AblationResult"),
    ),
    ("audiomae.config", ("load_config", "build_config", "dump_config")),
    ("audiomae.artifacts.embeddings", ("EmbeddingSet",)),
    ("audiomae.artifacts.releases", ("Release", "history", "rollback", "gc")),
    ("audiomae.corpus.manifest", ("list_corpus", "open_source")),
    ("audiomae.corpus.decode", ("decode", "probe")),
    ("audiomae.metrics", ("Labelled", "score_queries", "score_protocol", "summarise")),
    ("audiomae.errors", ("AudioMAEError", "UserError", "ConfigError", "IntegrityError", "DecodeError")),
)


def config_page() -> str:
    """docs/config.md."""
    from serve.arguments import ServeArgs

    lines = [
        "# Every setting",
        "",
        AGAIN,
        "",
        "A key is written the same way in a YAML file (`--config FILE`), after `--set` (`--set optim.lr=1e-3`), and",
        "with hyphens as a flag (`--optim.lr 1e-3`; `--lr 1e-3` too, where no other key has that last name). Later",
        "wins: files in their order, then `--set`, then flags. A list takes several words (`--seeds 0 1 2`), a mapping",
        "NAME=VALUE (`--data.exclude fold=1`), a switch stands alone (`--per-file`, `--no-per-file`).",
        "",
    ]
    sections: tuple[Section, ...] = (
        *CONFIG_SECTIONS,
        ("Serving", "`serve run serve.app:build KEY=VALUE ...`", ServeArgs, ()),
    )
    for title, where, config, without in sections:
        inherited = {key.name for base in without for key in config_keys(base)}
        lines += [f"## {title}", "", f"{where}: {_first_paragraph(config)}", ""]
        if inherited:
            also = "in a row" if configs.StageOptions in without else "training"
            lines += [f"Beside these it takes the keys of {also}, above.", ""]
        lines += ["| key | value | default | what it is |", "|---|---|---|---|"]
        lines += [_row(key) for key in config_keys(config) if key.name not in inherited]
        lines.append("")
    return "\n".join(lines)


def api_page() -> str:
    """docs/api.md."""
    lines = ["# Python interface", "", AGAIN, ""]
    for module_name, names in API:
        lines += [f"## {module_name}", ""]
        module = importlib.import_module(module_name)
        for name in names:
            lines += _described(name, getattr(module, name))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Write the pages, or compare them with what the code says."""
    check = "--check" in (sys.argv[1:] if argv is None else argv)
    stale = []
    for name, page in (("config.md", config_page()), ("api.md", api_page())):
        path = DOCS / name
        if path.exists() and path.read_text() == page:
            continue
        stale.append(name)
        if not check:
            path.write_text(page)
            print(f"written: docs/{name}")
    if check and stale:
        print(f"not what the code says: {', '.join(stale)}; run python -m ray_jobs.reference")
        return EXIT_FAILED
    return EXIT_OK


def _row(key: Key) -> str:
    default = "**required**" if key.field.is_required() else _code(_plain(key.default))
    about = (key.field.description or "").replace("|", "\\|")
    return f"| `{key.name}` | {_type(key)} | {default} | {about} |"


def _type(key: Key) -> str:
    return " or ".join(dict.fromkeys(_type_names(key.field.annotation))).replace("|", "\\|")


def _type_names(annotation: Any) -> Iterator[str]:
    plain = {int: "whole number", float: "number", str: "text", bool: "true, false", type(None): "null"}
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in plain:
        yield plain[annotation]
    elif origin is Literal:
        yield ", ".join(f"`{value}`" for value in arguments)
    elif origin in (list, tuple):
        items = [item for item in arguments if item is not Ellipsis]
        names = " or ".join(dict.fromkeys(name for item in items for name in _type_names(item)))
        yield f"list of {names}" if Ellipsis in arguments or origin is list else f"{len(items)} x {names}"
    elif origin is dict:
        yield "mapping"
    else:
        for argument in arguments:
            yield from _type_names(argument)


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return "recipes/ablations" if str(value).endswith("recipes/ablations") else str(value)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _first_paragraph(thing: Any) -> str:
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def _described(name: str, thing: Any) -> list[str]:
    """Heading, signature and docstring of a function, or of a class and its public members."""
    lines = [f"### {name}", ""]
    if inspect.isclass(thing):
        lines += [*_doc(thing), ""]
        for member, value in vars(thing).items():
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if member.startswith("_") or not (inspect.isfunction(function) or isinstance(value, property)):
                continue
            if isinstance(value, property):
                lines += [f"**`.{member}`** {_first_paragraph(value)}", ""]
            else:
                lines += [f"**`.{member}{_signature(function)}`**", "", *_doc(function), ""]
        return lines
    return [*lines, f"`{name}{_signature(thing)}`", "", *_doc(thing), ""]


def _signature(function: Any) -> str:
    text = str(inspect.signature(function))
    text = re.sub(r"<object object at 0x[0-9a-f]+>", "...", text)
    return (
        re.sub(r"\b(?:[a-z_]+\.)+([A-Za-z_]+)", r"\1", text)
        .replace("(self, ", "(")
        .replace("(self)", "()")
        .replace("(cls, ", "(")
    )


def _doc(thing: Any) -> list[str]:
    doc = inspect.getdoc(thing) or ""
    text = []
    for line in doc.splitlines():
        heading = re.fullmatch(r"(Args|Returns|Raises|Attributes):", line)
        text.append(f"\n{heading[1]}:\n" if heading else re.sub(r"^ {4}(\S)", r"- \1", line) if _listed(line) else line)
    return text


def _listed(line: str) -> bool:
    return bool(re.match(r"^ {4}[\w, `*.]+:", line))


if __name__ == "__main__":
    sys.exit(main())
