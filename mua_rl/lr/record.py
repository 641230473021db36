"""The LR record: one JSON file that says which learning rate was tuned, for what, and how.

A run or a sweep writes it; any later run reads it, whatever its rank, LoRA or full finetuning (`mua_rl.lr.transfer`).
"""

import dataclasses
import importlib.metadata
import json
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

from mua_rl.errors import UserError
from mua_rl.files import write_whole
from mua_rl.lr.rules import Configuration
from mua_rl.lr.spec import AdapterSpec, AlphaRule, Scheme

FILE_NAME = "lr_record.json"
FORMAT = "mua_rl LR record"
FORMAT_VERSION = 1
EVIDENCE = ("sweep", "run", "guess")
"""How a learning rate was found; only that of a sweep is known to be near the best."""


@dataclass(frozen=True)
class LRRecord:
    """A learning rate and what it was tuned with.

    Attributes:
        learning_rate: Peak learning rate η of the trained layers (of A and B alike).
        scheme: "Init[A]", "Init[B]" or "FFT".
        rank: LoRA rank; `None` for FFT.
        alpha: The multiplier's rule as text, e.g. "1" or "1/r".
        widths: Fan-ins n of the trained layers, each once, ascending.
        target_modules: The layers that carry LoRA ("mlp", "all-linear", a list of names); for FFT those that would.
        algorithm: "grpo", "ppo", or a field's ("sft", say): learning rates are compared within one.
        task: Task name or environment id.
        base_model: Name or path of the base model, for the reader.
        base_fingerprint: The fingerprint of the base's weights (`mua_rl.adapter.fingerprint`), which decides whether a
            later run has the same base.
        optimizer: {"name", "betas", "eps", "weight_decay", …}.
        schedule: {"name", "warmup_fraction", "final_fraction", "steps"}.
        batch: Sizes of one optimiser step, e.g. {"prompts": 32, "completions_per_prompt": 8}.
        metric: {"name", "before", "after"}; `after` is what the run reached.
        seeds: Seeds of the runs that support the learning rate.
        versions: The versions of packages and of Python, and the machine.
        weight_precision: The dtype of the trained weights.
        other_learning_rates: Learning rates, by role ("head", say), of parameters that the theory does not cover.
        lora_plus_ratio: The learning rate of B over that of A.
        outputs: m, the smallest fan-out of the trained layers; `None` where it is not known.
        evidence: One of `EVIDENCE`: the best of a sweep, one that a run ended no worse at, or a guess that was run.
        note: Where the learning rate comes from, in a sentence.
        created: When the record was made, in UTC, as ISO 8601 has it.
    """

    learning_rate: float
    scheme: str
    rank: int | None
    alpha: str
    widths: list[int]
    target_modules: str | list[str]
    algorithm: str
    task: str
    base_model: str
    base_fingerprint: str
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    batch: dict[str, Any]
    metric: dict[str, Any]
    seeds: list[int]
    versions: dict[str, str]
    weight_precision: str = "float32"
    other_learning_rates: dict[str, float] = field(default_factory=dict)
    lora_plus_ratio: float = 1.0
    outputs: int | None = None
    evidence: str = "run"
    note: str = ""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        check_learning_rate(self.learning_rate)
        for role, rate in self.other_learning_rates.items():
            check_learning_rate(rate, f"the learning rate of {role}")
        try:
            self.configuration()
        except (ValueError, KeyError) as error:
            raise UserError(f"an LR record that contradicts itself: {error}") from None
        if self.outputs is not None and self.outputs < 1:
            raise UserError(f"an LR record's layers have at least one output, not {self.outputs}.")
        if "name" not in self.optimizer:
            raise UserError("an LR record must name its optimizer.")
        if self.evidence not in EVIDENCE:
            raise UserError(f"an LR record's evidence is one of {', '.join(EVIDENCE)}, not {self.evidence!r}.")

    @property
    def spec(self) -> AdapterSpec:
        """What was trained."""
        return AdapterSpec(self.rank, Scheme(self.scheme), AlphaRule.parse(self.alpha))

    def configuration(self) -> Configuration:
        """What the rules need to know."""
        return Configuration(
            spec=self.spec,
            width=max(self.widths, default=0),
            optimizer=str(self.optimizer.get("name", "")),
            lora_plus_ratio=self.lora_plus_ratio,
            outputs=self.outputs,
        )

    def save(self, path: Path | str) -> Path:
        """Write the record to a file, or into a folder under its usual name; whole or not at all."""
        path = Path(path)
        if path.suffix != ".json":
            path = path / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=2)
        write_whole(path, text + "\n")
        return path

    @classmethod
    def load(cls, path: Path | str) -> "LRRecord":
        """Read a record file, or the record of a run folder.

        Raises:
            UserError: There is no record, or it is corrupt, incomplete, contradictory or of a newer format.
        """
        path = Path(path)
        if path.is_dir():
            if not (path / FILE_NAME).exists():
                raise UserError(
                    f"the folder {path} holds no {FILE_NAME}: a run writes it when it ends no worse than it began "
                    "(an unfinished one goes on with --resume)."
                )
            path = path / FILE_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"there is no LR record at {path}.") from None
        except (OSError, ValueError) as error:
            raise UserError(f"the LR record {path} cannot be read ({error}): restore it or tune again.") from None
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise UserError(f"{path} is no LR record of mua_rl.")
        version = data.pop("format_version", None)
        if type(version) is not int or version < 1:
            raise UserError(f"the LR record {path} is corrupt: its format_version is {version!r}.")
        if version > FORMAT_VERSION:
            raise UserError(
                f"the LR record {path} has format version {version}, and this mua_rl reads up to {FORMAT_VERSION}: "
                "upgrade mua_rl."
            )
        return cls._from_dict(data, path)

    @classmethod
    def _from_dict(cls, data: dict[str, Any], path: Path) -> "LRRecord":
        fields = {f.name: f for f in dataclasses.fields(cls)}
        required = {
            name
            for name, f in fields.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        if missing := sorted(required - data.keys()):
            raise UserError(f"the LR record {path} is incomplete, it lacks: {', '.join(missing)}; tune again.")
        if unknown := sorted(data.keys() - fields.keys()):
            raise UserError(f"the LR record {path} has unknown entries: {', '.join(unknown)}; upgrade mua_rl.")
        if "evidence" not in data:  # of a version before 0.2, whose note says it
            note = str(data.get("note"))
            data["evidence"] = {"a sweep": "sweep", "a guess": "guess"}.get(note[:7], "run")
        hints = get_type_hints(cls)
        for name, value in data.items():
            if not _has_type(value, hints[name]):
                raise UserError(f"the LR record {path} is corrupt: {name} is {value!r}.")
        try:
            return cls(**data)
        except UserError as error:
            raise UserError(f"the LR record {path} is corrupt: {error}") from None


def check_learning_rate(value: float, what: str = "the learning rate") -> float:
    """Give back a learning rate that Adam can train with.

    Raises:
        UserError: The value is not a finite number between 0 and 1.
    """
    if not (isinstance(value, (int, float)) and 0 < value < 1):  # which NaN and infinity fail, too
        raise UserError(f"{what} must be a number between 0 and 1, not {value}; typical values are 1e-6 to 1e-2.")
    return float(value)


def package_versions() -> dict[str, str]:
    """Versions of what a run's result depends on, of Python and of the machine."""
    names = ("mua-rl", "torch", "transformers", "trl", "peft", "vllm", "gymnasium", "stable-baselines3", "numpy")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**versions, "python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value fits one of the annotations used above."""
    text = str(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if text == "int | None":
        return value is None or (isinstance(value, int) and not isinstance(value, bool))
    if text == "list[int]":
        return isinstance(value, list) and all(isinstance(v, int) for v in value)
    if text == "str | list[str]":
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    return isinstance(value, dict)
