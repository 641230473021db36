"""How runs are made, without what differs between them; the one place where an LR record is made of it."""

from dataclasses import dataclass, field
from typing import Any

from mua_rl.lr.record import LRRecord, package_versions
from mua_rl.lr.rules import Configuration
from mua_rl.lr.spec import AdapterSpec


@dataclass(frozen=True)
class Recipe:
    """What all runs of a sweep have in common, whatever their rank, scheme, learning rate and seed.

    Attributes:
        algorithm, task, base_model, base_fingerprint, widths, outputs, target_modules, optimizer, batch: As in
            `LRRecord`.
        schedule: As in `LRRecord`; its "steps" are -1 where they are not known before the run (`--num_train_epochs`).
        score: The name of the held-out measure.
        other_learning_rates: As in `LRRecord`; `None` for a role that has the learning rate of the trained layers.
    """

    algorithm: str
    task: str
    base_model: str
    base_fingerprint: str
    widths: list[int]
    outputs: int | None
    target_modules: str | list[str]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    batch: dict[str, Any]
    score: str
    other_learning_rates: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, record: LRRecord) -> "Recipe":
        """The recipe of a record; a role with the record's own learning rate is taken to follow it."""
        names = ("algorithm", "task", "base_model", "base_fingerprint", "widths", "outputs", "target_modules")
        others = record.other_learning_rates.items()
        return cls(
            **{name: getattr(record, name) for name in (*names, "optimizer", "schedule", "batch")},
            score=record.metric["name"],
            other_learning_rates={role: None if rate == record.learning_rate else rate for role, rate in others},
        )

    def configuration(self, spec: AdapterSpec) -> Configuration:
        """What the rules need to know of a run."""
        return Configuration(spec, max(self.widths, default=0), str(self.optimizer["name"]), outputs=self.outputs)

    def record(
        self,
        spec: AdapterSpec,
        learning_rate: float,
        scores: tuple[float | None, float],
        seeds: list[int],
        evidence: str,
        note: str,
        steps: int,
    ) -> LRRecord:
        """The LR record of runs that ended well.

        Args:
            spec: What was trained.
            learning_rate: The peak learning rate η of the trained layers.
            scores: The held-out measure before and after training.
            seeds: The seeds of the runs.
            evidence: How the learning rate was found, as in `LRRecord`.
            note: Where the learning rate comes from, in a sentence.
            steps: The steps that a run took, where the schedule does not know them.
        """
        schedule = {**self.schedule, "steps": steps} if self.schedule.get("steps") == -1 else self.schedule
        others = self.other_learning_rates.items()
        return LRRecord(
            learning_rate=learning_rate,
            scheme=spec.scheme.value,
            rank=spec.rank,
            alpha=str(spec.alpha),
            widths=self.widths,
            target_modules=self.target_modules,
            algorithm=self.algorithm,
            task=self.task,
            base_model=self.base_model,
            base_fingerprint=self.base_fingerprint,
            optimizer=self.optimizer,
            schedule=schedule,
            batch=self.batch,
            metric={"name": self.score, "before": scores[0], "after": scores[1]},
            seeds=seeds,
            versions=package_versions(),
            other_learning_rates={role: learning_rate if rate is None else rate for role, rate in others},
            outputs=self.outputs,
            evidence=evidence,
            note=note,
        )
