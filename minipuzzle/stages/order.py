"""All stages of `prune`, in the order of the data.

    data -> tokens -> LayerScores, WidthScores, WidthCurves -> [Candidate] -> measured -> distilled
    -> model/
"""

from __future__ import annotations

from minipuzzle.stages.choosing import MEASURE, SEARCH, TOURNAMENT
from minipuzzle.stages.finishing import DISTILL, EXPORT
from minipuzzle.stages.scoring import CURVES, SCORE
from minipuzzle.stages.tokens import tokenize_stage

STAGES = (tokenize_stage(), SCORE, CURVES, SEARCH, MEASURE, TOURNAMENT, DISTILL, EXPORT)
NAMES = tuple(stage.name for stage in STAGES)
RESULT = (DISTILL.name, EXPORT.name)  # of one candidate: one chosen by hand has its own
