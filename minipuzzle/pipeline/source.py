"""Where models come from and where runs go."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from minipuzzle.core.errors import InputError, MinipuzzleError
from minipuzzle.core.files import parse_yaml, read_text
from minipuzzle.core.published import find_config, read_config
from minipuzzle.core.rundir import digest, read_about
from minipuzzle.models.weights import ModelFolder
from minipuzzle.recipes.schema import Recipe

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def bundled_model() -> Path:
    """The small trained model that comes with the package."""
    return Path(str(resources.files("minipuzzle") / "bundled" / "model"))


def find_model(model: str | Path) -> Path:
    """A folder as it is; a Hub id (owner/name) downloaded to the Hub's own cache.

    Raises:
        InputError: neither.
    """
    path = Path(model)
    if os.path.isdir(path):
        return path
    if os.path.lexists(path) or not HUB_ID.fullmatch(str(model)):
        raise InputError(f"{model}: no such model folder, and not a Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    with _hub(str(model), "it"):  # no file that is code
        return Path(snapshot_download(str(model), allow_patterns=[
            "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]))


def config_of(model: str) -> dict[str, Any]:
    """The configuration of a folder, a config.json, a published name or a Hub id, of which nothing
    else is fetched.

    Raises:
        InputError: none of them.
    """
    if os.path.lexists(model) or not HUB_ID.fullmatch(model):
        return find_config(model)
    from huggingface_hub import hf_hub_download

    with _hub(model, "its config.json"):
        file = hf_hub_download(model, "config.json")
    return read_config(Path(file))


@contextmanager
def _hub(model: str, what: str) -> Iterator[None]:
    """Errors of the Hub and of the network as a InputError."""
    try:
        yield
    except MinipuzzleError:
        raise
    except Exception as error:  # of the HTTP library, which is another in each release of huggingface_hub
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{model}: no such folder, and the Hub did not give {what} ({reason})") from None


def licence_of(folder: Path) -> dict[str, str]:
    """The licence keys of a model card, as the folder has them: what comes of a model inherits its
    licence."""
    try:
        _, front, _ = read_text(folder / "README.md").split("---\n", 2)
        card = parse_yaml(front)
        found = {key: str(card[key]) for key in ("license", "license_name", "license_link") if card.get(key)}
    except (MinipuzzleError, ValueError, yaml.YAMLError, AttributeError, TypeError):
        found = {}
    files = [name for name in ("LICENSE", "LICENSE.txt", "LICENSE.md") if (folder / name).is_file()]
    return found or ({"license": "other", "license_link": files[0]} if files else {})


def default_output(folder: ModelFolder, recipe: Recipe, seed: int) -> Path:
    """runs/NAME-HASH, a function of model and recipe: the same command finds its run again."""
    name = "bundled" if folder.path == bundled_model() else folder.path.resolve().name
    return Path("runs") / f"{name}-{digest([folder.fingerprint, recipe.model_dump(), seed])[:8]}"


def reopen(run: str | Path | None, given: list[str]) -> tuple[str, Recipe, Path, int]:
    """(model, recipe, folder, seed) of a run, to go on with another candidate.

    Raises:
        InputError: not a run, or options beside it, which the run has settled.
        CorruptArtifact: run.json is damaged.
    """
    path = Path(run or "")
    none = InputError(f"--candidate needs a run directory as MODEL, {run} is none")
    if not (path / "run.json").is_file():
        raise none
    about = read_about(path)
    try:
        recipe = Recipe.from_json(about.get("recipe"), str(path / "run.json"))
        model, seed = about["model"], about["seed"]
    except (InputError, KeyError) as error:
        raise InputError(f"{none} ({error})") from None
    if given:
        raise InputError(f"--candidate goes on with the recipe of {run}; leave out the options for "
                          f"{', '.join(given)}, or prune into another folder")
    return str(model), recipe, path, seed if type(seed) is int and seed >= 0 else 0
