"""Your own scores in place of ours: any table with a row per layer. Here ours times a prior on depth."""

MODEL, DATA = "bundled", "stdlib"
SAMPLES, LENGTH = 16, 256

# %% Ours, to begin with
from minipuzzle import LayerScores, score_layers, search_architectures  # noqa: E402

ours = score_layers(MODEL, DATA, samples=SAMPLES, sequence_length=LENGTH)
print(ours.table)

# %% Layers in the middle are worth less, say
table = ours.table.copy()
middle = (table["layer"] - table["layer"].mean()).abs() / len(table)
table["kl"] *= 0.5 + middle
candidates = search_architectures(MODEL, LayerScores(table, "with a prior on depth"), "memory=0.7x")
print(len(candidates), candidates[0])

# %% What goes by the one and not by the other
plain = search_architectures(MODEL, LayerScores(ours.table, "ours"), "memory=0.7x")
print(set(plain[0].kept_layers) ^ set(candidates[0].kept_layers))
