"""The LR policy: from an LR record and a target configuration to the learning rate, with its reason."""

from dataclasses import dataclass

from mua_rl.errors import UserError
from mua_rl.record import LRRecord, check_learning_rate
from mua_rl.rules import Configuration, TransferError, explain_ratio, lr_ratio

TRAINED_PRECISION = "float32"


@dataclass(frozen=True)
class LearningRate:
    """A learning rate with the reason for it, to be shown to the user and kept with the run."""

    value: float
    reason: str

    def __post_init__(self) -> None:
        check_learning_rate(self.value)


def given(value: float) -> LearningRate:
    """The learning rate that the user asked for."""
    return LearningRate(check_learning_rate(value), "given by --lr")


def transfer(record: LRRecord, target: Configuration, source_name: str = "the record") -> LearningRate:
    """The learning rate of `target` that follows from `record`; the record's own, exactly, for its own configuration.

    Raises:
        UserError: The theory does not give it, or the record's weights were not trained in fp32.
    """
    if record.weight_precision != TRAINED_PRECISION:
        raise UserError(
            f"{source_name} was tuned with trained weights in {record.weight_precision}, which rounds small updates "
            f"away and moves the best learning rate: tune again with {TRAINED_PRECISION} weights."
        )
    source = record.configuration()
    try:
        value = record.learning_rate * lr_ratio(source, target)
        reason = explain_ratio(source, target)
    except TransferError as error:
        raise UserError(f"{source_name} ({source}) does not give the learning rate of {target}: {error}") from None
    return LearningRate(value, f"{source_name} has {record.learning_rate:.4g} for {source}; {reason}")
