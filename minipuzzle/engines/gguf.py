"""GGUF by llama.cpp: its own converter and library, in an environment of their own.

`make test-engines` builds them once from the source distribution of llama-cpp-python, which has
both; docs/serving.md has the same by hand. The converter needs transformers 4.57.6: under
transformers 5 it takes every dense Nemotron-H for one with experts. So both run in that
environment's Python, and this file has only what is passed to it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minipuzzle.core.errors import ResourceError, UnsupportedModel
from minipuzzle.core.files import parse_json

VERSION = "0.3.36"  # of llama-cpp-python
TYPES = {"f32": 0, "q8_0": 7, "q4_k_m": 15}  # llama.h: enum llama_ftype

# The converter would run the code of a folder's tokenizer; here nothing that is read runs code.
# A byte-level BPE that somebody trained has a vocabulary that the converter cannot know by its
# hash; where the split is GPT-2's, which tokenizer.json says, the name of it is given.
_CONVERT = """
import json, runpy, sys
import transformers
def plain(load):
    return lambda *args, **named: load(*args, **named | {"trust_remote_code": False})
for auto in (transformers.AutoTokenizer, transformers.AutoConfig):
    auto.from_pretrained = plain(auto.from_pretrained)
source, folder, out = sys.argv[1:]
sys.path[:0] = [source + "/gguf-py", source]
from conversion import base
known = base.TextModel.get_vocab_base_pre
def named(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        about = json.load(open(folder + "/tokenizer.json"))
        split = about.get("pre_tokenizer") or {}
        if split.get("type") == "ByteLevel" and split.get("use_regex", True) and not about.get("normalizer"):
            return "gpt-2"
        raise
base.TextModel.get_vocab_base_pre = named
sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "f32"]
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""
_QUANTISE = """
import sys, llama_cpp
source, out, kind = sys.argv[1:]
how = llama_cpp.llama_model_quantize_default_params()
how.ftype = int(kind)
if llama_cpp.llama_model_quantize(source.encode(), out.encode(), how):
    raise SystemExit("llama_model_quantize failed")
"""
_LOG_PROBABILITIES = """
import json, sys, numpy, llama_cpp
rows = json.load(sys.stdin)
model = llama_cpp.Llama(sys.argv[1], n_ctx=len(rows[0]) + 8, logits_all=True, verbose=False, n_threads=1,
                        type_k=0, type_v=0)
found, last = [], []
for row in rows:
    model.reset()
    model.eval(row)
    logits = model.scores[:len(row)].astype(numpy.float64)
    logits -= logits.max(-1, keepdims=True)
    logits -= numpy.log(numpy.exp(logits).sum(-1, keepdims=True))
    found.append(logits[numpy.arange(len(row) - 1), row[1:]].tolist())
    last.append(logits[-1].tolist())
print(json.dumps({"tokens": found, "last": last}))
"""


def place() -> Path:
    """Where the environment is, or would be."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "minipuzzle" / f"llama-cpp-python-{VERSION}"


def check_built() -> None:
    """Raise ResourceError where llama.cpp is not there."""
    for part in ("venv/bin/python", "source/vendor/llama.cpp/convert_hf_to_gguf.py"):
        if not (place() / part).is_file():
            raise ResourceError(f"GGUF needs llama.cpp and its converter, and {place() / part} is not there; "
                                "'make test-engines' builds them, docs/serving.md says how by hand")


def convert(folder: Path, out: Path, kind: str = "f32") -> None:
    """A model folder -> a GGUF file of one of TYPES.

    Raises:
        ResourceError: llama.cpp is not there.
        UnsupportedModel: the converter refuses the folder.
    """
    check_built()
    whole = out if kind == "f32" else out.with_name(out.name + ".f32")
    try:
        _run(_CONVERT, [place() / "source" / "vendor" / "llama.cpp", folder, whole], str(folder))
        if kind != "f32":
            _run(_QUANTISE, [whole, out, TYPES[kind]], str(folder))
    finally:
        if kind != "f32":
            whole.unlink(missing_ok=True)


def log_probabilities(file: Path, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What llama.cpp says of token ids, all rows of one length: `tokens`, the log-probability of
    each token but the first; `last`, those of all tokens that may follow a row. float32, CPU."""
    check_built()
    return dict(parse_json(_run(_LOG_PROBABILITIES, [file], str(file), str([list(row) for row in rows])), file))


def _run(program: str, arguments: Sequence[object], what: str, given: str = "") -> str:
    """A program in llama.cpp's own environment; what it prints."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": ""}
    done = subprocess.run([str(place() / "venv" / "bin" / "python"), "-P", "-c", program, *map(str, arguments)],
                          input=given, capture_output=True, text=True, env=os.environ | quiet, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UnsupportedModel(f"llama.cpp does not take {what}: {reason}")
    return done.stdout
