"""The learning rate of an adapter on a model, from a record or from a learning rate that was tuned elsewhere."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from mua_rl.adapter.adapters import Adapter
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.errors import UserError
from mua_rl.lr import transfer as rules
from mua_rl.lr.record import LRRecord
from mua_rl.lr.transfer import LearningRate


def transfer(
    known: LRRecord | Path | str | float,
    target: Adapter,
    model: nn.Module,
    *,
    source: Adapter | None = None,
    algorithm: str = "",
    optimizer: str = "adamw",
    rank_exponent: float | None = None,
) -> LearningRate:
    """The learning rate of `target` on `model`, with the reason for it and a warning where it should not be relied on.

    Args:
        known: An LR record, its file, the folder of a run, or the learning rate that was tuned for `source`.
        target: What is to be trained: `LoRA(64)`, `Full()`.
        model: The base model, before `target.attach`.
        source: What a learning rate given as a number was tuned for, on the same model.
        algorithm: How it was tuned, "grpo", "ppo" or "sft", say; a record knows.
        optimizer: The optimizer's name; the rules hold for Adam's family.
        rank_exponent: c of `mua_rl.lr.transfer.rank_correction`; `None`: as measured for the algorithm.

    Raises:
        UserError: The record is of another base model, the theory does not give the learning rate, or a number is given
            without its source.
    """
    configuration = target.configuration(model, optimizer)
    if isinstance(known, int | float):
        if source is None:
            raise UserError("a learning rate needs its source: what was it tuned for, as in source=LoRA(8)?")
        origin = source.configuration(model, optimizer)
        record = LRRecord(
            learning_rate=known, scheme=origin.scheme.value, rank=origin.rank, alpha=str(origin.spec.alpha),
            widths=source.widths(model), target_modules=source.target_modules, algorithm=algorithm, task="",
            base_model="", base_fingerprint="", optimizer={"name": optimizer}, schedule={}, batch={}, metric={},
            seeds=[], versions={}, outputs=origin.outputs,
        )  # fmt: skip
        return rules.transfer(record, configuration, "the source", rank_exponent)
    if source is not None:
        raise UserError("a record says itself what it was tuned for: drop source.")
    record, name = (known, "the record") if isinstance(known, LRRecord) else (LRRecord.load(known), str(known))
    if fingerprint(model) != record.base_fingerprint:
        raise UserError(
            f"{name} is the record of another base model ({record.base_model}): tune on this one. (A model that "
            "carries a LoRA counts as another: ask before you attach it.)"
        )
    rate = rules.transfer(record, configuration, name, rank_exponent)
    if record.target_modules != target.target_modules:
        doubt = f"it was tuned on the layers {record.target_modules!r}, not on {target.target_modules!r}"
        rate = replace(rate, evidence=None, warning=f"{doubt}: tune on these. {rate.warning}".rstrip())
    return rate
