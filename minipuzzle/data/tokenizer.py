"""The tokenizer of a model folder, and what transformers raises about a folder, as our errors.

No code of the folder runs: `trust_remote_code` is False everywhere. Left out, transformers would
ask on stdin whether to import a class of the folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from minipuzzle.core.errors import CorruptArtifact, InputError, MinipuzzleError, UnsupportedModel
from minipuzzle.core.files import our_error, read_json

# any of these is a tokenizer that transformers may know
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


# what decides the tokens of a text or of a chat
_DECIDING = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json",
             "merges.txt", "added_tokens.json", "chat_template.jinja")


def tokenizer_hash(folder: Path) -> str:
    """What tells the tokenizer of a model folder from another."""
    parts = [folder / name for name in _DECIDING]
    return hashlib.sha256(b"".join(p.read_bytes() for p in parts if p.is_file())).hexdigest()[:16]


class Tokenizer(Protocol):
    """What is needed of a Hugging Face fast tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: list[str], **options: Any) -> Any: ...

    def __len__(self) -> int: ...


def load_tokenizer(folder: Path, whole_documents: bool = True) -> Any:
    """The tokenizer of a model folder, tried on a few words; the folder's configurations are
    tried too. `whole_documents`: without the model's maximum length.

    Raises:
        InputError: the folder has none.
        UnsupportedModel: it is code of the folder, or a class that this transformers lacks.
        CorruptArtifact: its files are damaged.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    if not any((folder / name).is_file() for name in FILES):
        raise InputError(f"{folder} has no tokenizer that transformers can load (none of {', '.join(FILES)}); copy "
                          "the model's own there")
    config = folder / "tokenizer_config.json"
    name = str(read_json(config).get("tokenizer_class"))[:100] if config.is_file() else "of an unknown class"
    # the result will have them too: fail now, not at its reload gate
    with stock_errors(folder, "config.json"):
        AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if (folder / "generation_config.json").is_file():
        with stock_errors(folder, "generation_config.json"):
            GenerationConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    with stock_errors(folder, f"tokenizer {name}"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False,
                                                  **({"model_max_length": 2**62} if whole_documents else {}))
        end = tokenizer.eos_token_id
        if not (end is None or (type(end) is int and end >= 0)) or len(tokenizer) < 1:
            raise ValueError(f"it has {len(tokenizer)} tokens and ends a text with {end!r}")
        encode(tokenizer, ["def few(words): return 1"])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens. Raises CorruptArtifact."""
    with stock_errors(getattr(tokenizer, "name_or_path", ""), "tokenizer"):
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        if len(ids) != len(texts) or any(min(row, default=0) < 0 or max(row, default=0) >= 2**32 for row in ids):
            raise ValueError("it gives no tokens")
    return ids


@contextmanager
def stock_errors(folder: Path | str, what: str) -> Iterator[None]:
    """A block in which transformers reads `what` of a folder: whatever it raises (some forty
    classes, plain `Exception` and Rust's panics among them) is about the folder."""
    try:
        yield
    except (MinipuzzleError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if "trust_remote_code" in str(error):
            raise UnsupportedModel(f"{folder}: its {what} is code of that folder, which is never run; use a class of "
                                   "transformers (a tokenizer.json), and remove auto_map") from None
        if isinstance(error, ImportError) or "does not exist or is not currently imported" in str(error):
            raise UnsupportedModel(f"{folder}: its {what} is not in this transformers ({reason}); use a "
                                   "tokenizer.json of a class that is") from None
        if isinstance(error, OSError) and error.errno:
            raise our_error(error, folder) from None
        raise CorruptArtifact(f"{folder}: its {what} cannot be used ({reason}); fetch the folder's files again"
                              ) from None
