"""`--recipe`: which recipe a training starts from, where the command line and its files do not say it all."""

from typing import Any

import pyarrow as pa
import yaml

from audiomae.config import build_config, merged, nearest
from audiomae.corpus.survey import sampled_headers
from audiomae.errors import ConfigError
from audiomae.storage import read_json, write_json
from audiomae.training.auto import Machine, choose, facts_of
from audiomae.training.clips import matches
from audiomae.training.recipe import Recipe
from ray_jobs._cluster import node_types, nodes, offers_gpus
from ray_jobs._ray import ENCODER, connect
from ray_jobs.configs import RECIPES, TrainConfig
from ray_jobs.training.feature_cache import list_files

AUTO, NONE = "auto", "none"
CHOICE_FILE = "recipe.json"


def fitted(config: TrainConfig, run: Any) -> TrainConfig:
    """The config of a run with its recipe laid under the keys that were given.

    Args:
        config: what the command line and its files say.
        run: folder of the run. What `auto` chose is kept there: a resumed run goes on with it.

    Raises:
        ConfigError: no such recipe.
    """
    said = config.model_dump(mode="json", exclude_unset=True, include=set(Recipe.model_fields))
    name = config.recipe or (NONE if _is_whole(said) else AUTO)
    if name == NONE:
        return config
    tree = _chosen(config, run) if name == AUTO else _read(name)
    whole = build_config(Recipe, merged(tree, said))
    return config.model_copy(update={key: getattr(whole, key) for key in Recipe.model_fields})


def _is_whole(said: dict[str, Any]) -> bool:
    """Whether the keys that were given name what is trained, so that there is nothing to choose."""
    return bool(said.get("init") or said.get("objective") or "backbone" in said.get("encoder", {}))


def _read(name: str) -> dict[str, Any]:
    path = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if not path.exists():
        names = [AUTO, NONE, *sorted(file.stem for file in RECIPES.glob("*.yaml"))]
        raise ConfigError(f"--recipe {name}: no such recipe{nearest(name, names)}; --config takes files of your own")
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    return tree


def _chosen(config: TrainConfig, run: Any) -> dict[str, Any]:
    """What fits the corpus and the cluster, or what was found to fit when the run began."""
    if (run / CHOICE_FILE).exists():
        choice = read_json(run / CHOICE_FILE)
    else:
        choice = _choose(config)
        write_json(run / CHOICE_FILE, choice)
    print(f"recipe {AUTO}: {choice['recipe']}.yaml; " + "; ".join(choice["reasons"]), flush=True)
    return merged(_read(choice["recipe"]), choice["changes"])


def _choose(config: TrainConfig) -> dict[str, Any]:
    root, listing = list_files(config.corpus, config.data)
    if config.data.exclude:
        listing = listing.filter(pa.array(~matches(listing, config.data.exclude, "exclude")))
    connect(loading=[ENCODER])
    machine = _machine()
    choice = choose(facts_of(listing, sampled_headers(root, listing), config.data), machine)
    return {"recipe": choice.recipe, "changes": choice.changes, "reasons": choice.reasons}


def _machine() -> Machine:
    """What the cluster has; what its autoscaler would start where nothing is up yet, of GPUs one."""
    up = nodes()
    cpus = sum(node.get("CPU", 0) for node in up) or max((kind.get("CPU", 0) for kind in node_types()), default=1)
    gpus = sum(node.get("GPU", 0) for node in up) or float(offers_gpus())
    return Machine(cpus=max(1, int(cpus)), gpus=int(gpus))
