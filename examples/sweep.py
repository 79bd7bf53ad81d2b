"""How small may it get?  python examples/sweep.py RUN

From the scores of a finished run: what several budgets would cost, in seconds, and the model of the one that you
would choose. Here: the smallest that is predicted to lose less than LIMIT.
"""

import sys

from minipuzzle import Run

BUDGETS = "memory=0.4x,0.5x,0.6x,0.7x,0.8x"
LIMIT = 0.5  # of KL to the parent, before training; nats per token


def main(run: str = "runs/mine", budgets: str = BUDGETS, limit: float = LIMIT) -> None:
    whole = Run.open(run)
    table = whole.search(budgets).dropna(subset=["name"])
    print(table[["budget", "name", "parameters", "memory_bytes", "predicted_damage"]].to_string(index=False))
    good = table[table["predicted_damage"].astype(float) < float(limit)]
    if good.empty:
        print(f"None is predicted to lose less than {limit}.")
        return
    best = good.sort_values("memory_bytes").iloc[0]
    print(whole.prune(best["name"]))  # or whole.prune(budget=best["budget"]): measured, and a winner among several


if __name__ == "__main__":
    main(*sys.argv[1:])
