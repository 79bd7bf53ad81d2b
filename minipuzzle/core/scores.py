"""LayerScores and WidthScores: what was measured about layers and channels, with standard errors.

`scores/layers.csv` is the layer table as a spreadsheet reads it; `search --scores` takes any such
CSV with `layer,kind` and one metric column.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from minipuzzle.core.errors import CorruptArtifact, InputError
from minipuzzle.core.files import open_tensors, read_text, reading

LAYER_METRICS = ("mse", "nmse", "kl", "loss_delta", "cosine")
_AGAIN = "the command that made it makes it again with --redo"
INTERACTIONS = "interactions.safetensors"
SAMPLES = "samples.safetensors"
TOGETHER, DROPPED = "together.csv", "dropped"  # a file, and its column of layers
COLUMNS = ("layer", "kind", "mse", "mse_stderr", "nmse", "kl", "kl_stderr", "loss_delta", "cosine", "samples")


@dataclass(frozen=True)
class LayerScores:
    """One row per layer of the parent: `table` has COLUMNS (a CSV from elsewhere may have fewer);
    iterative scoring adds `order`, the place in which the layer went (1 first, NaN never), and
    `added_METRIC`.

    `interactions`: "mse" and "kl" -> [layers, layers] of pairs (importance/layers.py).
    `keep`: layers that the search may not drop (search/keep.py).
    `samples`: the same sample by sample, for the errors of sums: a metric or "added_METRIC" ->
    [samples, layers], "pairs_mse" and "pairs_kl" -> [samples, layers, layers]; NaN where a race did
    not look.
    """

    table: pd.DataFrame
    source: str = ""
    interactions: dict[str, np.ndarray] = field(default_factory=dict)
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    keep: frozenset[int] = frozenset()

    def metric(self, name: str) -> np.ndarray:
        """[layers] of a metric, larger is more important; NaN where the table has no number. Raises
        InputError if there is no such column."""
        if name not in self.table.columns:
            have = [c for c in self.table.columns if c in LAYER_METRICS]
            raise InputError(f"scores {self.source or 'given'} have no column {name!r}; they have "
                              f"{', '.join(have) or 'no metric'}; choose one with --set scores.layer_metric=NAME")
        return _numbers(self.table[name])

    def stderr(self, name: str) -> np.ndarray:
        """[layers] of the metric's standard error; NaN where it was not measured."""
        column = f"{name}_stderr"
        if column in self.table.columns:
            return _numbers(self.table[column])
        return np.full(len(self.table), np.nan)

    @property
    def order(self) -> np.ndarray | None:
        """[layers] the place in which iterative scoring dropped each. It writes `added_METRIC` too:
        without that, `order` is somebody else's column."""
        ours = any(f"added_{name}" in self.table.columns for name in LAYER_METRICS)
        return _numbers(self.table["order"]) if ours and "order" in self.table.columns else None

    def added(self, name: str) -> np.ndarray | None:
        """[layers] what the removal of each added to the damage of those before it; NaN where it
        stayed, None if this metric was not scored iteratively."""
        return _numbers(self.table[f"added_{name}"]) if f"added_{name}" in self.table.columns else None

    @property
    def pattern(self) -> str:
        return "".join(self.table["kind"])

    def write(self, path: Path) -> None:
        """`layers.csv`, and beside it `interactions.safetensors` and `samples.safetensors`."""
        from safetensors.numpy import save_file

        self.table.to_csv(path, index=False, float_format="%.9g")
        save_file({k: np.ascontiguousarray(v) for k, v in self.interactions.items()}, path.parent / INTERACTIONS)
        save_file({k: np.ascontiguousarray(v, np.float32) for k, v in self.samples.items()}, path.parent / SAMPLES)

    @classmethod
    def read(cls, path: Path) -> LayerScores:
        """Read `layers.csv` with what lies beside it, or any CSV with `layer,kind` and a metric.

        Raises:
            InputError: no such file or no such columns.
            CorruptArtifact: layers that repeat or are missing, or have no kind.
        """
        if path.is_dir():
            path = path / "scores" if (path / "scores").is_dir() else path
            path = path / "layers.csv"
        if not path.is_file():
            raise InputError(f"no scores at {path}; make them with 'minipuzzle score'")
        table = _read_csv(path)
        if not {"layer", "kind"} <= set(table.columns) or not set(LAYER_METRICS) & set(table.columns):
            raise InputError(f"{path} needs the columns layer, kind and one of {', '.join(LAYER_METRICS)}; "
                              f"it has {', '.join(map(str, table.columns))}")
        with reading(path):  # layers may be words
            table = table.sort_values("layer", kind="stable").reset_index(drop=True)
        if list(table["layer"]) != list(range(len(table))):
            raise CorruptArtifact(f"{path}: layers must be 0 to {len(table) - 1}, each once")
        for layer, kind in enumerate(table["kind"]):
            if not isinstance(kind, str) or len(kind) != 1:
                raise CorruptArtifact(f"{path}: layer {layer} has no kind; it is one letter, as in the layer pattern")
        beside = path.parent / INTERACTIONS
        if path.name != "layers.csv" or not beside.is_file():
            return cls(table, str(path))
        samples = path.parent / SAMPLES
        return cls(table, str(path), _read_arrays(beside, _AGAIN)[0],
                   _read_arrays(samples, _AGAIN)[0] if samples.is_file() else {})


def _read_csv(path: Path, hint: str = "") -> pd.DataFrame:
    """Read through `read_text`: pandas would unpack what ends in .gz, and follow a URL."""
    text = read_text(path, hint=hint)
    with reading(path, hint=hint):
        return pd.read_csv(io.StringIO(text))


def _read_arrays(path: Path, hint: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by name, metadata) of a safetensors file."""
    with open_tensors(path, "numpy", hint=hint) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)


def _numbers(column: pd.Series) -> np.ndarray:
    return np.asarray(pd.to_numeric(column, errors="coerce"), float)


@dataclass(frozen=True)
class WidthScores:
    """Activation scores: the L2 over samples of mean |x| (arXiv:2504.11409, eq. 19).

    hidden: [D], summed over layers. layers: place -> layer -> scores, with a dimension for each
    axis that the family scores there, such as [F], or [heads, channels]. stderr, load: of places
    that not every token comes to, the standard error and the share of tokens, alike.
    """

    hidden: np.ndarray
    layers: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    samples: int = 0
    stderr: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    load: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)

    def arrays(self) -> dict[str, np.ndarray]:
        """Flat names for safetensors: `hidden`, `layers.3.ffn`, `layers.0.mamba`,
        `load.1.moe_experts`."""
        parts = {"layers": self.layers, "stderr": self.stderr, "load": self.load}
        return {"hidden": self.hidden} | {f"{part}.{layer}.{place}": array for part, places in parts.items()
                                          for place, arrays in places.items() for layer, array in arrays.items()}

    def write(self, path: Path) -> None:
        from safetensors.numpy import save_file

        save_file({k: np.ascontiguousarray(v) for k, v in self.arrays().items()}, path,
                  metadata={"samples": str(self.samples)})  # one key: several are written in any order

    @classmethod
    def read(cls, path: Path) -> WidthScores:
        """What `write` wrote. Raises CorruptArtifact."""
        arrays, about = _read_arrays(path, _AGAIN)
        parts: dict[str, dict[str, dict[int, np.ndarray]]] = {"layers": {}, "stderr": {}, "load": {}}
        with reading(path, hint=_AGAIN):
            for name in sorted(arrays.keys() - {"hidden"}):
                part, layer, place = name.split(".")
                parts[part].setdefault(place, {})[int(layer)] = arrays[name]
            return cls(arrays["hidden"], samples=int(about.get("samples", 0)), **parts)


@dataclass(frozen=True)
class WidthCurves:
    """The damage of cutting one axis alone to a few widths, measured by slicing the whole model,
    without training. `table` has axis, width, and the metrics of LayerScores in the same units, so
    that both may be added.

    `together`: what sets of layers and pairs of cuts do (search/together.py): how many layers of
    each kind go, by the recipe's keys; which (DROPPED); the widths that are cut; the same metrics.
    """

    table: pd.DataFrame
    together: pd.DataFrame | None = None

    def damage(self, axis: str, metric: str, widths: np.ndarray, parent_width: int) -> np.ndarray:
        """[n] at `widths`: linear between measured widths, 0 at the parent's, constant below the
        smallest."""
        rows = self.table[self.table["axis"] == axis]
        x = np.append(rows["width"].to_numpy(float), parent_width)
        y = np.append(rows[metric].to_numpy(float), 0.0)
        order = np.argsort(x)
        return np.asarray(np.interp(np.asarray(widths, float), x[order], y[order]))

    def write(self, path: Path) -> None:
        """`width_curves.csv`, and beside it `together.csv`."""
        self.table.to_csv(path, index=False, float_format="%.9g")
        if self.together is not None:
            self.together.to_csv(path.parent / TOGETHER, index=False, float_format="%.9g")

    @classmethod
    def read(cls, path: Path) -> WidthCurves:
        """What `write` wrote; `together` is None where it is not there.

        Raises:
            CorruptArtifact: columns are missing.
        """
        table, beside = _read_csv(path, _AGAIN), path.parent / TOGETHER
        together = _read_csv(beside, _AGAIN) if beside.is_file() else None
        for file, found, needed in ((path, table, {"axis", "width"}), (beside, together, {DROPPED})):
            if found is not None and not needed <= set(found.columns):
                raise CorruptArtifact(f"{file} needs the columns {', '.join(sorted(needed))}")
        return cls(table, together)
