"""Where models come from and where runs go."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from minipuzzle.core.errors import InputError, MinipuzzleError
from minipuzzle.core.published import find_config, read_config
from minipuzzle.recipes.schema import Recipe

BUNDLED = "bundled"  # a name of the model that comes with the package
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def bundled_model() -> Path:
    """The small trained model that comes with the package."""
    return Path(str(resources.files("minipuzzle") / "bundled" / "model"))


def recipe_of(recipe: Recipe | str | Path | None) -> Recipe:
    """A recipe as it is, by name or file; left out, the default. Raises InputError for anything
    else."""
    if isinstance(recipe, str | Path):
        return Recipe.load(recipe)
    if recipe is not None and not isinstance(recipe, Recipe):
        raise InputError(f"a recipe is a Recipe, a name or a file, not {type(recipe).__name__}")
    return recipe or Recipe()


def result_of(model: str | Path) -> str:
    """Of a run its result, RUN/model; anything else as it is.

    Raises:
        InputError: a run that has none yet; not a path or a name.
    """
    model = _text(model)
    if not os.path.isfile(os.path.join(model, "run.json")):
        return model
    found = os.path.join(model, "model")
    if not os.path.isfile(os.path.join(found, "config.json")):
        raise InputError(f"{model} has no result yet; 'minipuzzle prune' continues it")
    return found


def _text(model: str | Path) -> str:
    """A path or name as text. Raises InputError for other types."""
    if not isinstance(model, str | os.PathLike):
        raise InputError(f"a model is a folder, a run, a Hub id or 'bundled', not {type(model).__name__}")
    return os.fspath(model)


def find_model(model: str | Path, weights: bool = True) -> Path:
    """A folder as it is; "bundled"; a Hub id (owner/name) downloaded to the Hub's own cache, with or
    without its weights.

    Raises:
        InputError: none of them.
    """
    path = Path(_text(model))
    if os.path.isdir(path):
        return path
    if str(model) == BUNDLED and not os.path.lexists(path):
        return bundled_model()
    if os.path.lexists(path) or not HUB_ID.fullmatch(str(model)):
        raise InputError(f"{model}: no such model folder, and not a Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    with _hub(str(model), "it"):  # no file that is code
        return Path(snapshot_download(str(model), allow_patterns=[
            *(["*.safetensors"] if weights else []), "*.json", "*.model", "*.txt",
             "*.jinja", "README.md", "LICENSE*", "NOTICE*"]))


def config_of(model: str | Path) -> dict[str, Any]:
    """The configuration of a folder, a config.json, a published name, "bundled", or a Hub id, of
    which nothing else is fetched.

    Raises:
        InputError: none of them.
    """
    model = _text(model)
    if model == BUNDLED and not os.path.lexists(model):
        return read_config(bundled_model())
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
        raise InputError(
            f"{model}: no such folder, and {what} could not be downloaded from the Hub ({reason})") from None


