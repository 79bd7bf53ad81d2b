"""The table of docs/guide.md: what the recipes for a machine take, by the dry run.

    python benchmarks/guide.py            prints it; tests/test_docs.py compares

Nothing is read but the package: no weights, no network, no GPU.
"""

from __future__ import annotations

from minipuzzle.core.budget import human_bytes
from minipuzzle.recipes.schema import Recipe
from minipuzzle.verbs.dry_run import dry_run

# model, recipe, card, cards
ROWS = (("nemotron-h-8b", "nemotron-h-4b-1xh100", "h100", 1),
        ("nemotron-h-8b", "nemotron-h-4b-8xh100", "h100", 8),
        ("nemotron-3-nano-30b-a3b", "nemotron-3-nano-22b-8xh100", "h100", 8),
        ("nemotron-h-56b", "nemotron-h-47b-64xh100", "h100", 64))
STEPS = {"score and search": ("tokenize", "score", "curves", "search", "measure"), "tournament": ("tournament",),
         "distill": ("distill",), "export": ("export",)}


def table() -> str:
    lines = ["| recipe | step | time | each GPU | each host | disk |", "|---|---|---|---|---|---|"]
    for model, recipe, card, gpus in ROWS:
        about, _, refused = dry_run(model, Recipe.load(recipe), gpu=card, gpus=gpus)
        assert refused is None, refused
        needs = {need["name"]: need for need in about["stages"]}
        for step, names in STEPS.items():
            some = [needs[name] for name in names]
            lines.append(f"| {f'`{recipe}`' if step == 'score and search' else ''} | {step} "
                         f"| {_time(sum(n['seconds'] for n in some))} "
                         + "".join(f"| {human_bytes(max(n[k] for n in some))} " for k in ("gpu_bytes", "host_bytes"))
                         + f"| {human_bytes(sum(n['disk_bytes'] for n in some))} |")
        whole = needs.values()
        lines.append(f"| | together | **{_time(sum(n['seconds'] for n in whole))}** "
                     + "".join(f"| {human_bytes(max(n[k] for n in whole))} " for k in ("gpu_bytes", "host_bytes"))
                     + f"| {human_bytes(sum(n['disk_bytes'] for n in whole))} |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds >= 86400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    print(table())
