"""What a sweep knows of its base policy before the first trial: where to look, and what its LR record will say."""

import copy
import math
from dataclasses import dataclass, fields, replace
from typing import Any

from mua_rl.errors import UserError
from mua_rl.lr import transfer as policy
from mua_rl.lr.record import LRRecord
from mua_rl.lr.rules import best_lr_order
from mua_rl.lr.spec import AdapterSpec
from mua_rl.run.learning_rate import find_record
from mua_rl.sweep.arguments import Request
from mua_rl.sweep.search import Search, scan_around, scan_range

PLACEHOLDER = math.nextafter(1e-3, 1.0)
"""A template's learning rate, and that of a head that follows it: none that anyone gives, so that a given one stays."""


@dataclass(frozen=True)
class Facts:
    """Of a base policy and the runs that start from it; kept in the study, so that they are found once.

    Attributes:
        template: The LR record of a run of the sweep, but for the learning rate, what it reached and its seeds.
        source: The record that the search begins with.
        source_name: For the reader.
        known: Whether `source` is of this very base.
        obstacle: Why LoRA trials of this base cannot be trained side by side (GRPO); "" where they can.
    """

    template: LRRecord
    source: LRRecord
    source_name: str
    known: bool
    obstacle: str = ""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Facts":
        """What `asdict` of it was; a study that an earlier version began may hold more, and lack what has a default."""
        known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        return cls(**{**known, "template": LRRecord(**data["template"]), "source": LRRecord(**data["source"])})

    def record_of(self, curve: AdapterSpec) -> LRRecord:
        """The template, for a curve."""
        return replace(self.template, scheme=curve.scheme.value, rank=curve.rank, alpha=str(curve.alpha))

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
        target = self.record_of(curve).configuration()
        try:
            rate = policy.transfer(self.source, target, self.source_name, rank_exponent)
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
    arguments = copy.copy(request.trainer)
    adapter = replace(request.adapter, rank=str(max(ranks, default="full")), lr=PLACEHOLDER, lr_from=None)
    metric = {"name": f"held-out {'accuracy' if request.sweep.algo == 'grpo' else 'return'}"}
    if request.sweep.algo == "grpo":
        from mua_rl.grpo import run as grpo

        grpo_setup = grpo.prepare_grpo(arguments, adapter)
        base, template = grpo_setup.base, grpo.lr_record(arguments, grpo_setup, metric, arguments.max_steps)
        obstacle = _obstacle(grpo_setup.policy, arguments) if ranks else ""
    else:
        from mua_rl.ppo.run import lr_record
        from mua_rl.ppo.setup import set_up

        setup = set_up(arguments, adapter)
        base, template, obstacle = setup.base, lr_record(arguments, setup, metric), ""
        if (envs := setup.model.get_env()) is not None:
            envs.close()
    source, source_name = find_record(request.adapter, base, request.sweep.algo)
    return Facts(template, source, source_name, base.is_base_of(source), obstacle)


def _obstacle(policy: Any, arguments: Any) -> str:
    """See `Facts`."""
    from mua_rl.grpo.stacked.settings import check_policy

    try:
        check_policy(policy, arguments)
    except UserError as error:
        return str(error)
    return ""
