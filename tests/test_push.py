"""`minipuzzle push` with the real huggingface_hub, against a local stand-in for the Hub's HTTP API."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minipuzzle import Run
from minipuzzle.core.errors import CorruptArtifact, InputError

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """Repositories by name, with what was committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Api)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.visibility: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.fails_with = 0


class Api(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *words: Any) -> None: ...

    def _answer(self, data: Any, status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.server.blobs[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({})

    def do_POST(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub.asked.append(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if hub.fails_with:
            return self._answer({"error": "not today"}, hub.fails_with)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'ann'}/{asked['name']}"
            known = name in hub.visibility
            hub.visibility.setdefault(name, asked.get("visibility", "public"))
            return self._answer({"url": f"{hub.url}/{name}", "name": name}, 409 if known else 200)
        if path == "/api/validate-yaml":
            assert "library_name: transformers" in json.loads(body)["content"]
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": f, "shouldIgnore": False, "uploadMode": "lfs" if f.endswith(".safetensors") else "regular"}
                     for f in files]
            return self._answer({"files": modes})
        if path.endswith("/objects/batch"):
            objects = [o | {"actions": {"upload": {"href": f"{hub.url}/put/{o['oid']}"}}}
                       for o in json.loads(body)["objects"]]
            return self._answer({"transfer": "basic", "objects": objects})
        assert "/commit/" in path, path
        for row in map(json.loads, body.splitlines()):
            if row["key"] == "file":
                hub.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            elif row["key"] == "lfsFile":
                hub.files[row["value"]["path"]] = hub.blobs[row["value"]["oid"]]
        return self._answer({"commitUrl": f"{hub.url}/ann/x/commit/c0ffee", "commitOid": "c0ffee"})


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(hub: Hub, *words: str | Path, token: str = TOKEN, url: str = "") -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads where its Hub is when it is imported."""
    env = os.environ | {"HF_ENDPOINT": url or hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token,
                        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run([sys.executable, "-m", "minipuzzle", "push", *map(str, words)], capture_output=True, text=True, env=env)


def test_the_result_and_its_card_go_up_and_nothing_else(hub: Hub, finished: Path, texts: Path) -> None:
    done = push(hub, finished, "ann/half", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["repo"], told["commit"], told["url"]) == ("ann/half", "c0ffee", f"{hub.url}/ann/half")
    assert hub.visibility == {"ann/half": "private"}
    model = finished / "model"
    assert set(hub.files) == {p.name for p in model.iterdir()} == set(told["files"])
    for name, content in hub.files.items():
        if name not in ("README.md", "minipuzzle.json"):
            assert content == (model / name).read_bytes(), name
    card = hub.files["README.md"].decode()
    assert 'folder = "ann/half"' in card
    for said in (card, hub.files["minipuzzle.json"].decode()):
        assert str(texts.parent) not in said  # no path of this machine; what the data are called is
        assert str(finished) not in said
    assert "Data: texts." in card
    assert json.loads(hub.files["minipuzzle.json"])["result"]["candidate"]
    again = push(hub, finished, "ann/half", "--public")  # one that is there is pushed to
    assert "pushed" in again.stdout
    assert hub.visibility == {"ann/half": "private"}


def test_a_dry_run_asks_nobody(hub: Hub, finished: Path) -> None:
    said = push(hub, finished, "--dry-run", token="").stdout
    assert "would push" in said
    assert "model.safetensors" in said
    assert hub.asked == []
    told = Run.open(finished).push_to_hub(dry_run=True)
    assert told["repo"] == finished.name
    assert told["bytes"] == sum(p.stat().st_size for p in (finished / "model").iterdir())


def test_what_the_hub_refuses_is_said_in_a_line(hub: Hub, finished: Path) -> None:
    cases = ((2, "does not know this token", {"token": "hf_other"}, 0), (2, "refuses ann/half (403: not today)", {}, 403),
             (6, "cannot be reached", {"url": "http://127.0.0.1:9"}, 0))
    for code, said, how, status in cases:
        hub.fails_with = status
        done = push(hub, finished, "ann/half", **how)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert said in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    assert hub.files == {}


def test_what_is_no_result_is_not_pushed(finished: Path, model_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    run = Run.open(copy)
    with pytest.raises(InputError, match="no name of a repository"):
        run.push_to_hub("a/b/c", dry_run=True)
    with (copy / "model" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(CorruptArtifact, match="changed after it was written"):
        run.push_to_hub(dry_run=True)
    from minipuzzle.verbs.push import push as upload

    with pytest.raises(InputError, match="no result of minipuzzle"):
        upload(model_folder, dry_run=True)
