"""Prune a model until it fits a graphics card:  python examples/prune_to_a_card.py MODEL CARD

The budget is what the card leaves for weights, KV cache and Mamba states in vLLM, at the workload below.
`minipuzzle devices` lists the cards.
"""

import sys

from minipuzzle import Architecture, Recipe, prune
from minipuzzle.core.budget import human_bytes
from minipuzzle.core.devices import find_device
from minipuzzle.engines.fit import fit
from minipuzzle.verbs.source import config_of

WORKLOAD = {"workload.context": "32k", "workload.batch": 8, "workload.engine": "vllm"}


def main(model: str = "bundled", card: str = "l4", data: str | None = None, output_dir: str = "runs/card",
         recipe: str = "default") -> None:
    asked = Recipe.load(recipe, data=data, settings=WORKLOAD)
    found = fit(Architecture.from_config(config_of(model)), asked.workload.build(), find_device(card))
    room = found["available_bytes"] - found["workspace_bytes"]
    print(f"{model} needs {human_bytes(found['needed_bytes'])} of {human_bytes(found['available_bytes'])} on {card}")
    if found["fits"]:
        print("It fits as it is.")
        return
    run = prune(model, asked.with_overrides(budget={"memory": str(room)}), output_dir)
    print(run)
    print(f"serve it with: vllm serve {run.model_path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
