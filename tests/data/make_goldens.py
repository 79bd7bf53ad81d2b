"""Write published_searches.json: what the recipes of published models find.  python
tests/data/make_goldens.py

The facts of the papers are not here but in tests/test_published_searches.py; this is what would
change unnoticed.
"""

import json
import tempfile
from pathlib import Path

from minipuzzle.recipes.schema import Recipe
from minipuzzle.verbs.search import research

HERE = Path(__file__).parent
GOLDENS = HERE / "published_searches.json"
# recipe: (parent, scores)
SEARCHES = {"nemotron-h-47b": ("nemotron-h-56b", "nemotron_h_56b_fig9_layer_mse.csv"),
            "nemotron-h-4b": ("nemotron-h-8b", "nemotron_h_8b_fig4_layer_kld.csv"),
            "nemotron-nano-9b-v2": ("nemotron-nano-12b-v2", None),
            "nemotron-3-nano-22b": ("nemotron-3-nano-30b-a3b", None),
            "nemotron-3-super-75b": ("nemotron-3-super-120b-a12b", None)}
COSTS = ("parameters", "weights_bytes", "kv_cache_bytes", "mamba_state_bytes", "memory_bytes")
WIDTHS = ("hidden_size", "ffn_size", "mamba_num_heads", "mamba_head_dim")
EXPERTS = ("num_experts", "experts_per_token", "moe_ffn_size", "shared_ffn_size", "moe_latent_size")


def find(name, folder, **overrides):
    """candidates.json (with the search under "search") of a recipe."""
    model, scores = SEARCHES[name]
    recipe = Recipe.load(name).with_overrides(**overrides)
    return research(recipe, None, Path(model), scores and HERE / scores, folder)[1]


def dropped(document, candidate):
    """The parent's layers that are gone."""
    return sorted({*range(len(document["parent"]["architecture"]["pattern"]))} - {*candidate["kept_layers"]})


def summary(document):
    """The counts, the parent's cost, and a few candidates: the first and every 500th."""
    every = document["candidates"]
    chosen = sorted({*range(min(5, len(every))), *range(0, len(every), 500)})
    return {"points": document["search"]["points"], "feasible": document["search"]["feasible"],
            "candidates": len(every), "space": document["search"]["space"], "budget": document["budget"],
            "parent_cost": {key: document["parent"]["cost"][key] for key in COSTS},
            "rows": [{"rank": rank, "dropped": dropped(document, every[rank]),
                      "damage": every[rank]["predicted"]["damage"]}
                     | {axis: every[rank]["architecture"][axis] for axis in WIDTHS}
                     | {axis: n for axis in EXPERTS if (n := every[rank]["architecture"][axis])}
                     | {key: every[rank]["cost"][key] for key in COSTS} for rank in chosen]}


def goldens():
    """recipe -> summary."""
    out = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in SEARCHES:
            out[name] = summary(find(name, Path(scratch) / name))
    return out


if __name__ == "__main__":
    text = json.dumps(goldens()).replace('{"rank"', '\n{"rank"').replace(', "nemotron', ',\n"nemotron')  # one row a line
    GOLDENS.write_text(text + "\n")
