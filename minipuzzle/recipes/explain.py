"""What every key of a recipe means, from the schema's own words: for the terminal and for
docs/recipe.md."""

from __future__ import annotations

import difflib
import textwrap
from typing import Any

import yaml

from minipuzzle.core.budget import BUDGET_KEYS
from minipuzzle.core.errors import InputError
from minipuzzle.recipes.schema import BUDGET_WORDS, Recipe, json_schema

_BUDGET_UNITS = {"bytes": "bytes; KiB, MiB, GiB, TiB", "decimal": "a count; k, M, B, T", "seconds": "s, ms",
                 "rate": "tok/s, ktok/s"}
Entry = dict[str, Any]


def explained() -> dict[str, Entry]:
    """Every section and key, in the schema's order. A section has `key` and `description`; a key also
    `default`, `values` (what it may be), `unit` and `source`."""
    schema = json_schema()
    defaults, out = Recipe().model_dump(), {}
    for name, part in schema["properties"].items():
        section = schema["$defs"][part["$ref"].rsplit("/", 1)[1]] if "$ref" in part else part
        out[name] = {"key": name, "description": " ".join(section["description"].split())}
        if name == "recipe":
            out[name] |= _facts(part, defaults[name])
        for key, field in section.get("properties", {}).items():
            out[f"{name}.{key}"] = {"key": f"{name}.{key}", "description": field["description"],
                                    **_facts(field, defaults[name][key])}
            if "$ref" in field.get("items", {}):  # a list of parts with keys of their own
                part = schema["$defs"][field["items"]["$ref"].rsplit("/", 1)[1]]
                out |= {f"{name}.{key}.{k}": {"key": f"{name}.{key}.{k}", "description": f["description"],
                                              **_facts(f, "needed" if k in part["required"] else "of the section")}
                        for k, f in part["properties"].items()}
        if name == "budget":
            for key, (_, units) in BUDGET_KEYS.items():
                out[f"budget.{key}"] = {"key": f"budget.{key}", "description": BUDGET_WORDS[key],
                                        "default": defaults["budget"].get(key), "source": "ours",
                                        "values": "a bound, or a part of the parent's such as 0.5x",
                                        "unit": _BUDGET_UNITS[units]}
    return out


def explain(key: str | None) -> list[Entry]:
    """All entries; or of a section, itself and its keys; or of one key.

    Raises:
        InputError: no such section or key.
    """
    entries = explained()
    if key is None:
        return list(entries.values())
    if key not in entries:
        known = {name.partition(".")[2]: name for name in entries} | {name: name for name in entries}
        near = difflib.get_close_matches(key, known, n=1)
        raise InputError(f"no key {key!r} in a recipe{f' (did you mean {known[near[0]]!r}?)' if near else ''}; "
                         "'minipuzzle recipes explain' lists all")
    return [entry for name, entry in entries.items() if name == key or name.startswith(f"{key}.")]


def lines(entries: list[Entry], whole: bool) -> list[str]:
    """For a terminal: one line each, or with `whole` all that is known."""
    out = []
    for entry in entries:
        name, about = entry["key"], entry["description"]
        if "default" not in entry:
            out += ["", *(textwrap.wrap(f"{name}: {about}", 100) if whole else [_cut(f"{name}: {_first(about)}")])]
        elif not whole:
            out.append(_cut(f"  {name:38} {_written(entry['default']):22} {_first(about)}"))
        else:
            out += ["", f"{name} = {_written(entry['default'])}",
                    *textwrap.wrap(about, 100, initial_indent="  ", subsequent_indent="  "),
                    *(f"  {what + ':':8}{entry[what]}" for what in ("values", "unit", "source") if entry[what])]
    return out[1:] if out[:1] == [""] else out


def page() -> str:
    """docs/recipe.md."""
    out = ["# Recipe", "", "Every section and key, from `recipes/schema.py`: `minipuzzle recipes explain` "
           "prints the same.", "This page is generated: `python -m minipuzzle.recipes.explain > docs/recipe.md`.",
           "[commands.md](commands.md) says which setting wins."]
    keys = ["", "| key | default | means | values | source |", "|---|---|---|---|---|"]
    for name, entry in explained().items():
        if "." not in name:
            out += ["", f"## {name}", *textwrap.wrap(entry["description"], 110),
                    *([f"Always {entry['default']}."] if "default" in entry else keys)]
        else:
            unit = f" ({entry['unit']})" if entry["unit"] else ""
            cells = (entry["description"], entry["values"] + unit, entry["source"])
            out.append("| " + " | ".join([f"`{name.partition('.')[2]}`", f"`{_written(entry['default'])}`",
                                          *(cell.replace("|", "\\|") for cell in cells)]) + " |")
    return "\n".join(out) + "\n"


def _facts(field: dict[str, Any], default: Any) -> Entry:
    return {"default": default, "values": _values(field), "unit": field["unit"], "source": field["source"]}


def _values(field: dict[str, Any]) -> str:
    """What a key may be, of its JSON schema."""
    parts = [inner for part in field.get("anyOf", [field]) for inner in part.get("anyOf", [part])]
    if any(part.get("type") == "boolean" for part in parts):
        return ", ".join(["true, false", *(str(part["const"]) for part in parts if "const" in part)])
    if choices := [choice for part in parts for choice in part.get("enum", [])]:
        return ", ".join([*choices, *("null" for part in parts if part.get("type") == "null")])
    if "const" in field:
        return str(field["const"])
    if any(part.get("type") == "array" for part in parts):
        return "a list" if field.get("type") == "array" else "a range"
    if any("pattern" in part for part in parts):
        return "a number, also as 64k"
    found = [f"{word} {field[name]:,}" for name, word in (
        ("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"),
        ("exclusiveMaximum", "below")) for field in parts if name in field]
    return ", ".join(found) or "text"


def _written(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True, width=999)).removesuffix("...\n").strip()


def _first(text: str) -> str:
    """The first sentence."""
    return text.partition(". ")[0].rstrip(".") + "."


def _cut(line: str) -> str:
    return line if len(line) <= 150 else f"{line[:147]}..."


if __name__ == "__main__":
    print(page(), end="")
