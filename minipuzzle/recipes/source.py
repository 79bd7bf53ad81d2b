"""Where models come from and where runs go."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from minipuzzle.core.errors import RecipeError
from minipuzzle.core.rundir import digest
from minipuzzle.models.weights import ModelFolder
from minipuzzle.recipes.schema import Recipe


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
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise RecipeError(f"{model}: no such model folder, and not a Hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=[
            "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise RecipeError(f"{model}: no such folder, and the Hub did not give it "
                          f"({str(error).strip().splitlines()[0]})") from None


def default_output(folder: ModelFolder, recipe: Recipe, seed: int) -> Path:
    """runs/NAME-HASH, a function of model and recipe: the same command finds its run again."""
    name = "bundled" if folder.path == bundled_model() else folder.path.resolve().name
    return Path("runs") / f"{name}-{digest([folder.fingerprint, recipe.model_dump(), seed])[:8]}"
