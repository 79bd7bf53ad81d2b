"""docs/adding-a-family.md: its code, run as it stands there, makes a family that is pruned and
opened again."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from family_contract import FamilyContract
from safetensors.torch import load_file, save_file
from tiny import relative, rms, tokens
from torch import nn

from minipuzzle.core.budget import Workload
from minipuzzle.core.errors import InputError
from minipuzzle.costs.cost import cost
from minipuzzle.families import registry
from minipuzzle.families.architecture import Architecture
from minipuzzle.importance.layers import score, score_iteratively, score_layers
from minipuzzle.importance.racing import Race
from minipuzzle.importance.widths import score_widths
from minipuzzle.models.passes import Pass
from minipuzzle.models.selection import select
from minipuzzle.models.walk import Model, final_hidden
from minipuzzle.models.weights import open_model
from minipuzzle.search.space import resolve_space
from minipuzzle.surgery.cut import Cutter

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-family.md"
CODE = "\n\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
page = ModuleType("page")
exec(compile(CODE, str(PAGE), "exec"), page.__dict__)
CONFIG = {"model_type": "toy", "num_hidden_layers": 3, "vocab_size": 97, "hidden_size": 32, "ffn_size": 48,
          "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "state_size": 8, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    """The line in FAMILIES."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.FAMILIES, "toy", page.TOY)
        TestToy.arch = Architecture.from_config(CONFIG)
        yield


def toy_logits(arch: Architecture, weights: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The model written out by hand: h <- h + attention(n(h)) + ffn(n(h)), h <- h + mamba(n(h)),
    for each pair."""
    x = weights["embed.weight"][ids]
    for pair in range(arch.num_layers // 2):
        prefix = f"layers.{pair}."
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        part = {kind: {n.replace(name, "mixer.", 1): w for n, w in own.items() if n.startswith(name)}
                for kind, name in (("*", "self_attn."), ("-", "mlp."), ("M", "mamba."))}
        h = rms(x, own["input_layernorm.weight"], arch.norm_eps)
        x = x + tiny.reference_mixer(arch, "*", part["*"], h) + tiny.reference_mixer(arch, "-", part["-"], h)
        h = rms(x, own["mamba_layernorm.weight"], arch.norm_eps)
        x = x + tiny.reference_mixer(arch, "M", part["M"], h)
    return rms(x, weights["norm.weight"], arch.norm_eps) @ weights["head.weight"].T


class Theirs(nn.Module):
    """The same as other code would have it: modules with shapes of their own, from config.json."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        c = SimpleNamespace(**config)
        inner, bc = c.mamba_num_heads * c.mamba_head_dim, 2 * c.n_groups * c.state_size
        q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        def pair() -> nn.ModuleDict:
            mamba = nn.ModuleDict({"in_proj": linear(c.hidden_size, 2 * inner + bc + c.mamba_num_heads),
                                   "conv1d": nn.Conv1d(inner + bc, inner + bc, 4, groups=inner + bc),
                                   "norm": nn.RMSNorm(inner), "out_proj": linear(inner, c.hidden_size)})
            for name in ("A_log", "D", "dt_bias"):
                mamba.register_parameter(name, nn.Parameter(torch.zeros(c.mamba_num_heads)))
            sizes = {"q": (c.hidden_size, q), "k": (c.hidden_size, kv), "v": (c.hidden_size, kv), "o": (q, c.hidden_size)}
            return nn.ModuleDict({
                "input_layernorm": nn.RMSNorm(c.hidden_size), "mamba_layernorm": nn.RMSNorm(c.hidden_size), "mamba": mamba,
                "self_attn": nn.ModuleDict({f"{n}_proj": linear(*size) for n, size in sizes.items()}),
                "mlp": nn.ModuleDict({"up_proj": linear(c.hidden_size, c.ffn_size),
                                      "down_proj": linear(c.ffn_size, c.hidden_size)})})

        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(pair() for _ in range(c.num_hidden_layers))
        self.norm, self.head = nn.RMSNorm(c.hidden_size), linear(c.hidden_size, c.vocab_size)
        self.config = config

    def forward(self, ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        arch = Architecture.from_config(self.config)
        return SimpleNamespace(logits=toy_logits(arch, dict(self.named_parameters()), ids))


def theirs_of(folder: Path) -> Theirs:
    """A folder opened by other code: names and shapes must be the ones it knows."""
    model = Theirs(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.double()


class TestToy(FamilyContract):
    family = page.TOY
    config = CONFIG

    def weights(self, arch: Architecture, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return tiny.trained_like(arch, dtype=dtype)

    def theirs(self, arch: Architecture, weights: Mapping[str, torch.Tensor]) -> Any:
        model = Theirs(arch.to_config(CONFIG))
        model.load_state_dict(dict(weights), strict=True)
        return model

    def reference(self, arch: Architecture, weights: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        return toy_logits(arch, weights, ids)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    arch = Architecture.from_config(CONFIG)
    (tmp_path / "toy").mkdir()
    save_file(tiny.trained_like(arch), tmp_path / "toy" / "model.safetensors")
    (tmp_path / "toy" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "toy"


def test_the_code_of_the_page_is_short() -> None:
    assert 40 < sum(bool(line.strip()) for line in CODE.splitlines()) < 150


@pytest.mark.parametrize("rotates", [True, False])
def test_a_toy_is_pruned_and_opened_again(folder: Path, tmp_path: Path, rotates: bool) -> None:
    """By the page's own code, within the budget, and other code opens the result to the same
    logits."""
    parent, ids = open_model(folder).arch, tokens(2, 40)
    best = page.prune(folder, tmp_path / "small", tokens(4, 24), {"params": "0.35x", "memory": "0.6x"}, rotates)
    assert best.cost.parameters <= 0.35 * cost(parent, Workload()).parameters
    again = open_model(tmp_path / "small")
    assert again.arch == best.architecture
    assert again.arch.hidden_size < parent.hidden_size  # or the rotation would have nothing to do
    model = Model.load(again, dtype=torch.float64)
    mine = final_hidden(model, ids) @ model.head.T
    with torch.no_grad():
        assert relative(mine, theirs_of(tmp_path / "small")(ids).logits) < 1e-12
        assert relative(mine, theirs_of(folder)(ids).logits) > 0.01


def test_pairs_go_together(folder: Path) -> None:
    """What a layer's ablation leaves out is its pair; candidates keep whole pairs; a pair costs
    what its layers do."""
    model, ids = Model.load(open_model(folder)), tokens(3, 20)
    arch = model.arch
    assert (arch.pattern, arch.num_hidden_layers, arch.layers_of("PM")) == ("PMPMPM", 3, (0, 2, 4))
    scores = score_layers(model, ids)
    kl = scores.metric("kl")
    assert kl[::2].tolist() == kl[1::2].tolist()
    assert len(set(kl.tolist())) == 3
    gone = int(kl.argmin()) // 2
    space = resolve_space({"drop_pair": [0, 2], "drop_mamba": [0, 9]}, arch)  # another family's key says nothing here
    assert space.to_json() == {"drop_pair": [0, 1, 2], "hidden_size": [32], "ffn_size": [48], "mamba_num_heads": [8],
                               "mamba_head_dim": [8]}
    first = page.search_architectures(arch, space, page.Budget.parse({"params": "0.8x"}, cost(arch, Workload()).to_json()),
                                      Workload(), scores).candidates[0]
    assert first.kept_layers == tuple(i for i in range(6) if i // 2 != gone)
    assert first.architecture.num_hidden_layers == 2
    assert first.predicted["layers"] == pytest.approx(scores.metric("mse")[2 * gone])
    race = Race({"PM": (0, 1)})
    for ask in (lambda: score_iteratively(Pass(model, ids), race), lambda: score(Pass(model, ids), race)):
        with pytest.raises(InputError, match="layers that go together"):
            ask()


def test_a_parallel_block_is_refitted_at_once(folder: Path) -> None:
    """Both of its writers, by one regression: the held-out error of no block rises."""
    model = Model.load(open_model(folder))
    ids = tokens(40, 40)
    target = dataclasses.replace(model.arch, ffn_size=24, mamba_num_heads=4)
    cutter = Cutter(model, score_widths(model, ids[:4]))
    small, fits = cutter.refitted(target, tuple(range(6)), ids)
    assert len(fits) == 6
    assert all(fit.after <= fit.before for fit in fits)
    assert fits[0].after < 0.9 * fits[0].before
    plain = model.slice(target, select(model.arch, target, tuple(range(6)), cutter.scores))
    changed = {n for n, t in small.by_name().items() if not torch.equal(t, plain.by_name()[n])}
    assert {"layers.0.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight"} <= changed
