"""Where models come from and where runs go."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from minipuzzle.core.errors import RecipeError
from minipuzzle.core.published import find_config, read_config
from minipuzzle.core.rundir import digest
from minipuzzle.models.weights import ModelFolder
from minipuzzle.recipes.schema import Recipe

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def bundled_model() -> Path:
    """The small trained model that comes with the package."""
    return Path(str(resources.files("minipuzzle") / "bundled" / "model"))


def find_model(model: str | Path) -> Path:
    """A folder as it is; a Hub id (owner/name) downloaded to the Hub's own cache.

    Raises:
        RecipeError: neither.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(str(model)):
        raise RecipeError(f"{model}: no such model folder, and not a Hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=[
            "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise RecipeError(f"{model}: no such folder, and the Hub did not give it "
                          f"({str(error).strip().splitlines()[0]})") from None


def config_of(model: str) -> dict[str, Any]:
    """The configuration of a folder, a config.json, a published name or a Hub id, of which nothing else is fetched.

    Raises:
        RecipeError: none of them.
    """
    if Path(model).exists() or not HUB_ID.fullmatch(model):
        return find_config(model)
    from huggingface_hub import hf_hub_download

    try:
        return read_config(Path(hf_hub_download(model, "config.json")))
    except OSError as error:  # of the Hub and of the network
        raise RecipeError(f"{model}: no such folder, and the Hub did not give its config.json "
                          f"({str(error).strip().splitlines()[0]})") from None


def licence_of(folder: Path) -> dict[str, str]:
    """The licence keys of a model card, as the folder has them: what comes of a model inherits its licence."""
    try:
        _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        card = yaml.safe_load(front)
        found = {key: str(card[key]) for key in ("license", "license_name", "license_link") if card.get(key)}
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError):
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
        RecipeError: not a run, or options beside it, which the run has settled.
    """
    path = Path(run or "")
    try:
        about = json.loads((path / "run.json").read_text())
        recipe = Recipe.model_validate(about["recipe"])
    except (OSError, KeyError, json.JSONDecodeError, ValidationError):
        raise RecipeError(f"--candidate needs a run directory as MODEL, {run} is none") from None
    if given:
        raise RecipeError(f"--candidate goes on with the recipe of {run}; leave out the options for "
                          f"{', '.join(given)}, or prune into another folder")
    return about["model"], recipe, path, about["seed"]
