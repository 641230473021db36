"""Held-out returns on the way of a run, and the best policy of them."""

from collections.abc import Callable

from stable_baselines3.common.callbacks import BaseCallback

from mua_rl.ppo.evaluation import Returns
from mua_rl.run.folder import RunFolder

BEST, BEST_STATISTICS = "best_policy.zip", "best_vecnormalize.pkl"


class Evaluations(BaseCallback):
    """Measures the policy whenever `every` more environment steps have been trained on, and keeps the best one.

    Args:
        run: The run, whose metrics get the returns, and whose folder the best policy, as `BEST` for plain SB3 with its
            observation statistics beside it.
        every: Environment steps between two measurements.
        measure: Measures the policy.
        key: What the metrics call the mean return.
    """

    def __init__(self, run: RunFolder, every: int, measure: Callable[[], Returns], key: str):
        super().__init__()
        self.run, self.every, self.measure, self.key = run, every, measure, key

    def _on_training_start(self) -> None:
        self._last = self.model.num_timesteps

    def _on_rollout_start(self) -> None:
        steps = self.model.num_timesteps
        if steps // self.every == self._last // self.every:
            return
        self._last = steps
        returns, best = self.measure(), best_before(self.run, self.key, steps)
        self.run.log(steps, {self.key: returns.mean, "held_out/iqm": returns.iqm})
        if best is None or returns.mean > best[0]:
            self.model.save(self.run.path / BEST)
            if (statistics := self.model.get_vec_normalize_env()) is not None:
                statistics.save(str(self.run.path / BEST_STATISTICS))

    def _on_step(self) -> bool:
        return True


def best_before(run: RunFolder, key: str, end: int) -> tuple[float, int] | None:
    """The highest mean return before step `end`, and the step that it was measured after; None: there is none."""
    measured = [(line[key], -line["step"]) for line in run.metrics() if key in line and 0 < line["step"] < end]
    if not measured:
        return None
    score, step = max(measured)
    return score, -step
