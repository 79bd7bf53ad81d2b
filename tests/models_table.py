"""The README's table of models, from the families and the published configurations.

    python tests/models_table.py        writes it into README.md
"""

from __future__ import annotations

from pathlib import Path

from minipuzzle.core.published import published, published_names
from minipuzzle.families.architecture import Architecture
from minipuzzle.families.registry import FAMILIES
from minipuzzle.verbs.doctor import axes

README = Path(__file__).parents[1] / "README.md"
HEAD = ("family", "layers", "published names", "priced", "pruned", "what can be cut", "the result opens in")


def table() -> str:
    """A row for each set of kinds of layers that a published model of a family has."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in published_names():
        arch = Architecture.from_config(published(name))
        kinds = ", ".join(kind.label for letter, kind in arch.family.kinds.items() if letter in arch.pattern)
        groups.setdefault((arch.model_type, kinds), []).append(name)
    rows = [HEAD, ("---",) * len(HEAD)]
    for (model_type, kinds), names in groups.items():
        cut = {axis for name in names for axis, (_, why) in axes_of(name).items() if not why}
        labels = ["layers", *(axis.label for name, axis in FAMILIES[model_type].axes.items() if name in cut)]
        rows.append((f"`{model_type}`", kinds, ", ".join(f"`{name}`" for name in names), "yes",
                     *(("yes", ", ".join(labels), "transformers") if cut else ("not yet", "-", "-"))))
    return "\n".join("| " + " | ".join(row) + " |" if row[0] != "---" else "|" + "|".join(row) + "|" for row in rows)


def axes_of(name: str) -> dict[str, tuple[str, str]]:
    config = published(name)
    return axes(Architecture.from_config(config), config)


def current() -> str:
    """The table as README.md has it."""
    text = README.read_text(encoding="utf-8")
    return text[text.index("| " + HEAD[0]):text.index("\n\nThe names are those")]


if __name__ == "__main__":
    README.write_text(README.read_text(encoding="utf-8").replace(current(), table()), encoding="utf-8")
