"""A result to the Hugging Face Hub: the files of model/ and its card, nothing else of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from minipuzzle.core.errors import InputError, ResourceError
from minipuzzle.core.rundir import RunDir
from minipuzzle.verbs.source import HUB_ID, result_of

PUSHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*")
ABOUT = "minipuzzle.json"  # every folder that we write has it
# /home/ann/texts -> texts: what others cannot use, and should not see
_PATH = re.compile(r"(?<![\w:/.~-])~?(?:/[^\s/\"'`,;|()]+)+/([^\s/\"'`,;|()]+)")


def push(model: str | Path, repo: str | None = None, private: bool = True, dry_run: bool = False) -> dict[str, Any]:
    """Upload a run's result, or a folder that minipuzzle wrote, to a model repository; in one commit. Left
    out, `repo` has the name of the run, in the account of the token. A repository that is new is private
    unless told; one that is there keeps its visibility. `dry_run` names the files and uses no network. The
    card and minipuzzle.json keep the names of local files, not their paths.

    Back come `repo`, `url` and `commit` (null for a dry run), `private`, `files` and `bytes`.

    Raises:
        InputError: no result, not a name of a repository, or the Hub refuses it.
        CorruptArtifact: a run's result was changed after it was checked.
        ResourceError: the Hub cannot be reached.
    """
    path = Path(result_of(model))
    path = path / "model" if not (path / "config.json").is_file() else path
    if not all((path / name).is_file() for name in ("config.json", "README.md", ABOUT)):
        raise InputError(f"{model} has no result of minipuzzle with its card; 'minipuzzle prune' makes one")
    run = path.parent
    name = repo or run.resolve().name
    if not (HUB_ID.fullmatch(name) or re.fullmatch(r"[\w.-]+", name, re.ASCII)):
        raise InputError(f"{name!r} is no name of a repository; write owner/name")
    if (run / "stages").is_dir():
        RunDir(run, hold=False).verify("export")
    files = sorted({file for pattern in PUSHED for file in path.glob(pattern) if file.is_file()})
    told = {"repo": name, "url": None, "commit": None, "private": private, "files": [f.name for f in files],
            "bytes": sum(f.stat().st_size for f in files)}
    return told if dry_run else told | _upload(name, private, files)


def _upload(name: str, private: bool, files: list[Path]) -> dict[str, Any]:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(library_name="minipuzzle")
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        content = [CommitOperationAdd(f.name, _shown(f, made.repo_id)) for f in files]
        commit = api.create_commit(made.repo_id, content, commit_message="Upload by minipuzzle")
        return {"repo": made.repo_id, "url": str(made), "commit": commit.oid}
    except LocalTokenNotFoundError:
        raise InputError("the Hub asks who you are: 'hf auth login' once, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        said = error.server_message or str(error).strip().splitlines()[0]
        if status == 401:
            raise InputError("the Hub does not know this token: 'hf auth login', or set HF_TOKEN to one that may "
                             "write") from None
        if 400 <= status < 500:
            raise InputError(f"the Hub refuses {name} ({status}: {said})") from None
        raise ResourceError(f"the Hub failed ({status}: {said}); nothing was committed, try again later") from None
    except Exception as error:  # of the HTTP library, which is another in each release of huggingface_hub
        if not type(error).__module__.startswith(("http", "requests", "urllib", "huggingface_hub", "builtins")):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ResourceError(f"the Hub cannot be reached ({reason})") from None


def _shown(file: Path, repo: str) -> bytes | Path:
    """The file; of the card and of what we say ourselves a copy without paths of this machine."""
    if file.name not in ("README.md", ABOUT):
        return file
    text = file.read_text(encoding="utf-8").replace("path/to/this/folder", repo)
    return _PATH.sub(r"\1", text).encode()
