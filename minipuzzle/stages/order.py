"""All stages of `prune`, in the order of the data.

    data -> tokens -> LayerScores, WidthScores, WidthCurves -> [Candidate] -> measured -> distilled
    -> model/ (-> quantized/model/)
"""

from __future__ import annotations

from minipuzzle.pipeline.stage import Stage
from minipuzzle.recipes.schema import Recipe
from minipuzzle.stages.choosing import MEASURE, SEARCH
from minipuzzle.stages.finishing import DISTILL, EXPORT
from minipuzzle.stages.quantizing import QUANTIZE
from minipuzzle.stages.scoring import CURVES, SCORE
from minipuzzle.stages.tokens import tokenize_stage
from minipuzzle.stages.tournament import TOURNAMENT

STAGES = (tokenize_stage(), SCORE, CURVES, SEARCH, MEASURE, TOURNAMENT, DISTILL, EXPORT)
NAMES = tuple(stage.name for stage in STAGES)
RESULT = (DISTILL.name, EXPORT.name, QUANTIZE.name)  # of one candidate: one chosen by hand has its own


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """Those of this recipe: the result is quantised where it says to what."""
    return (*STAGES, QUANTIZE) if recipe.quantization.asked else STAGES
