"""A run from Python, from start to end. Cells (# %%) open as a notebook in VS Code, Spyder and Jupytext."""

MODEL, RECIPE, RUN = "bundled", "default", "runs/quickstart"  # a folder, a run or a Hub id; a name or a file

# %% Make it smaller: a few minutes on two cores. The same line continues after a stop.
from minipuzzle import Run, prune  # noqa: E402

run = prune(MODEL, RECIPE, output_dir=RUN)
print(run)  # in a notebook, `run` alone shows the head of its report

# %% What was found
print(run.candidates.head())
print(run.layers[["layer", "kind", "kl", "kept"]])

# %% Another budget, from the same scores: seconds
found = run.search("memory=0.6x,0.8x")
print(found)

# %% Measured against its parent; loaded in transformers
print(run.evaluate()["kl"])
model = run.load_model()
print(model.num_parameters())

# %% Another candidate, distilled too, beside the first
second = run.prune(run.candidates["name"].iloc[1])
print(Run.open(RUN).compare(second)[["parameters", "distilled", "KL"]])
