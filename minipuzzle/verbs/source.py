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

BUNDLED = "bundled"  # a name of the model that comes with the package
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def bundled_model() -> Path:
    """The small trained model that comes with the package."""
    return Path(str(resources.files("minipuzzle") / "bundled" / "model"))


def result_of(model: str) -> str:
    """Of a run its result, RUN/model; anything else as it is.

    Raises:
        InputError: a run that has none yet.
    """
    if not os.path.isfile(os.path.join(model, "run.json")):
        return model
    found = os.path.join(model, "model")
    if not os.path.isfile(os.path.join(found, "config.json")):
        raise InputError(f"{model} has no result yet; 'minipuzzle prune' continues it")
    return found


def find_model(model: str | Path) -> Path:
    """A folder as it is; "bundled"; a Hub id (owner/name) downloaded to the Hub's own cache.

    Raises:
        InputError: none of them.
    """
    path = Path(model)
    if os.path.isdir(path):
        return path
    if str(model) == BUNDLED and not os.path.lexists(path):
        return bundled_model()
    if os.path.lexists(path) or not HUB_ID.fullmatch(str(model)):
        raise InputError(f"{model}: no such model folder, and not a Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    with _hub(str(model), "it"):  # no file that is code
        return Path(snapshot_download(str(model), allow_patterns=[
            "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]))


def config_of(model: str) -> dict[str, Any]:
    """The configuration of a folder, a config.json, a published name, "bundled", or a Hub id, of
    which nothing else is fetched.

    Raises:
        InputError: none of them.
    """
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


