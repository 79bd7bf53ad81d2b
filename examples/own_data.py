"""Prune for your own data:  python examples/own_data.py MODEL DATA...

DATA are text, JSONL (a `text` per line, or the `messages` of a chat) or parquet files, folders of them, or data sets of
the Hub (hf:owner/name). Several are mixed, the first with most weight. Held-out documents are set apart by a hash of
their text: what is reported is never trained on.
"""

import sys

from minipuzzle import Recipe, prune


def blend(sources: tuple[str, ...]) -> str:
    """a, b, c -> "a=0.5,b=0.3333,c=0.1667": weights that fall to nothing."""
    if not sources[1:]:
        return sources[0]
    total = len(sources) * (len(sources) + 1) / 2
    return ",".join(f"{source}={(len(sources) - i) / total:.4f}" for i, source in enumerate(sources))


def main(model: str, *sources: str, output_dir: str = "runs/own-data", recipe: str = "default") -> None:
    run = prune(model, Recipe.load(recipe, data=blend(sources)), output_dir)
    print(run)
    print(run.report["evaluation"])  # the text that the losses are of


if __name__ == "__main__":
    main(*sys.argv[1:])
