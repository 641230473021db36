"""What a sweep knows of its base policy before the first trial: where to look, and what its LR record will say."""

import copy
import math
from dataclasses import dataclass, fields, replace
from typing import Any

from mua_rl.errors import UserError
from mua_rl.lr.recipe import Recipe
from mua_rl.lr.record import LRRecord
from mua_rl.lr.rules import best_lr_order
from mua_rl.lr.spec import AdapterSpec
from mua_rl.lr.transfer import transfer
from mua_rl.run.learning_rate import find_record
from mua_rl.sweep.arguments import Request
from mua_rl.sweep.search import Search, scan_around, scan_range

ANY_RATE = 1e-3
"""A learning rate for a run that is set up and never trained."""


@dataclass(frozen=True)
class Facts:
    """What is known of a base policy and of the runs that start from it; the study keeps it.

    Attributes:
        recipe: How the runs of the sweep are made.
        source: The record that the search begins with.
        source_name: Its name for the reader.
        known: Whether `source` is of this very base.
        obstacle: Why LoRA trials of this base cannot be trained in one process; "" where they can.
    """

    recipe: Recipe
    source: LRRecord
    source_name: str
    known: bool
    obstacle: str = ""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Facts":
        """The facts of `asdict`; those of a version before 0.2 have a record with some learning rate for the recipe."""
        recipe = Recipe(**data["recipe"]) if "recipe" in data else Recipe.of(LRRecord(**data["template"]))
        known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        return cls(**{**known, "recipe": recipe, "source": LRRecord(**data["source"])})

    def search(self, curve: AdapterSpec, request: Request) -> Search:
        """The search for a curve's optimum."""
        resolution = request.sweep.resolution
        if request.sweep.grid is not None:
            low, high = request.sweep.grid
            scan, step = scan_range(low, high, resolution)
        else:
            scan, step = scan_around(*self._centre(curve, request.adapter.rank_exponent), resolution)
        return Search(curve, scan, step, resolution, request.seeds)

    def _centre(self, curve: AdapterSpec, rank_exponent: float | None) -> tuple[float, bool]:
        """log2 of the learning rate to look around, and whether it is more than a guess."""
        target = self.recipe.configuration(curve)
        try:
            rate = transfer(self.source, target, self.source_name, rank_exponent)
            return math.log2(rate.value), self.known
        except UserError:  # the theory has only the exponents here, or the record does not say enough: a guess does
            ratio = best_lr_order(target) / best_lr_order(self.source.configuration())
            return math.log2(self.source.learning_rate * ratio), False


def find_facts(request: Request) -> Facts:
    """Load the base and attach the largest LoRA that is asked for, which shows that all of them fit.

    Raises:
        UserError: The trainer cannot use what was given.
    """
    ranks = [spec.rank for spec in request.specs if spec.rank is not None]
    adapter = replace(request.adapter, rank=str(max(ranks, default="full")), lr=ANY_RATE, lr_from=None)
    recipe, base, obstacle = request.algorithm.examine(copy.copy(request.trainer), adapter)
    source, source_name = find_record(request.adapter, base, request.sweep.algo)
    return Facts(recipe, source, source_name, base.is_base_of(source), obstacle)
