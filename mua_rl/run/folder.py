"""The run folder: what a run was asked, what it ran with, what it measured, and what it made.

config.yaml       the settings that were given; `--config` of the same command runs it again
rate.json         the learning rate and why it is that: what `--resume` goes on with, whatever the records say then
versions.json     package versions, git commit, command line, machine
metrics.jsonl     one line a step: reward, loss, gradient norm, learning rate read back from the optimizer, …
checkpoint-N/     where `--resume` goes on
best/             with --save_best, the policy that was best on the way, and best.json with its step
adapter/, model/  what was trained: a PEFT adapter (LoRA), or all weights (full finetuning)
result.json       accuracy or return before and after, time, whether the run diverged; written last: with it the run has
                  ended, and until then `--resume` goes on
lr_record.json    the LR record, never of a run that diverged
curve.png         the learning curve
wandb_id          the run at Weights & Biases, where it reports there
terminated        the mark of a run that was ended by SIGTERM, which the same command goes on with
"""

import json
import math
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import yaml

from mua_rl.errors import UserError, one_line, without_password
from mua_rl.files import write_whole
from mua_rl.lr.record import FILE_NAME as RECORD
from mua_rl.lr.record import package_versions
from mua_rl.run import processes
from mua_rl.run.machine import git_commit
from mua_rl.run.trial import Status, TrialResult

CONFIG, VERSIONS, METRICS, RESULT, CURVE = "config.yaml", "versions.json", "metrics.jsonl", "result.json", "curve.png"
RATE, WANDB_ID, BEST = "rate.json", "wandb_id", "best"
ADAPTER_FOLDER, MODEL_FOLDER = "adapter", "model"
ADAPTER_CONFIG = "adapter_config.json"
LOCK, MARK = ".lock", "terminated"
PATHS = ("model", "tokenizer_name", "base", "vec_normalize", "lr_from", "start_from")


_locks: dict[Path, IO] = {}
"""The locks on the run folders that this process works in, held for as long as it lives."""


class RunFolder:
    """A folder that belongs to one run.

    Attributes:
        path: The path of the folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | None, name: str) -> "RunFolder":
        """Make a new folder at `path`; where `path` is `None`, under `runs/` by a name that no other run has.

        Raises:
            UserError: The folder exists and is not empty, since nothing is ever written over; or it cannot be made.
        """
        if path is None:
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
            for suffix in ("", *(f"-{k}" for k in range(2, 1000))):
                folder = Path("runs") / f"{name}-{stamp}{suffix}"
                try:
                    folder.mkdir(parents=True)
                except FileExistsError:
                    continue
                except OSError as error:
                    raise UserError(
                        f"the run folder {folder} cannot be made in {Path.cwd()}: {error.strerror}; name another with "
                        "--output_dir."
                    ) from None
                return cls(folder)
        folder = Path(str(path))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be made: {error.strerror}.") from None
        run = cls(folder)
        if any(folder.iterdir()):
            broken_off = (folder / RATE).exists() and run.result() is None  # a script without --resume writes none
            onward = f", or go on with --resume {folder}" * broken_off
            raise UserError(f"{folder} is not empty: choose another --output_dir{onward}.")
        return run

    @classmethod
    def open(cls, path: str) -> "RunFolder":
        """The folder of an earlier run.

        Raises:
            UserError: The path is no run folder.
        """
        run = cls(path)
        if not (run.path / CONFIG).exists():
            raise UserError(f"{path} is no run folder: it has no {CONFIG}.")
        return run

    @classmethod
    def around(cls, path: str) -> "RunFolder":
        """The run that a folder is, or is in (a checkpoint, or `best`).

        Raises:
            UserError: There is none.
        """
        parent = Path(path).resolve().parent
        is_within = not (Path(path) / CONFIG).exists() and Path(path).is_dir() and (parent / CONFIG).exists()
        return cls(parent) if is_within else cls.open(path)

    @classmethod
    def open_policy(cls, path: str) -> "RunFolder":
        """The folder of an earlier run that left a policy.

        Raises:
            UserError: The path is no run folder, or a sweep's.
        """
        run = cls.open(path)
        if "algo" in run.settings():
            raise UserError(f"{path} is a sweep, which holds no policy: name a run, such as one with --lr_from {path}.")
        return run

    def start(self, settings: dict[str, Any], rate: dict[str, Any] | None = None) -> None:
        """Write down what the run was asked, and what it runs with.

        Args:
            settings: The settings that were given.
            rate: The learning rate, as `learning_rate` gives it back.

        Raises:
            UserError: Another run has begun in the folder since it was seen to be empty.
        """
        try:
            with open(self.path / CONFIG, "x", encoding="utf-8") as stream:
                stream.write(without_password(yaml.safe_dump(settings, sort_keys=True, allow_unicode=True)))
        except FileExistsError:
            raise UserError(f"another run has just begun in {self.path}: choose another --output_dir.") from None
        if rate is not None:
            (self.path / RATE).write_text(json.dumps(rate, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        versions = {
            **package_versions(),
            "command": without_password(" ".join([Path(sys.executable).name, *sys.argv])),
            "git_commit": git_commit(),
            "host": f"{platform.platform()}, {os.cpu_count()} cores",
            "processes": processes.count(),
        }
        (self.path / VERSIONS).write_text(json.dumps(versions, indent=2) + "\n", encoding="utf-8")

    def reopen(self, settings: Mapping[str, Any]) -> None:
        """Go on with the run, which may be to go beyond its end; what it came to there is kept beside.

        Args:
            settings: What is asked now.
        """
        (self.path / MARK).unlink(missing_ok=True)
        if (result := self.result()) is not None:
            for name in (RESULT, RECORD):
                if (path := self.path / name).exists():
                    path.rename(path.with_stem(f"{path.stem}-at-{result.steps}"))
            print(f"the run goes on beyond step {result.steps}, by the schedule of its new length")
        settings = {**self.settings(), **with_whole_paths(dict(settings))}
        write_whole(self.path / CONFIG, yaml.safe_dump(settings, sort_keys=True, allow_unicode=True))

    def lock(self) -> None:
        """Keep other processes out until this one ends, however it does: the kernel takes the lock back.

        Raises:
            UserError: Another process works in the folder, or it cannot be written to.
        """
        if (path := self.path.resolve()) in _locks:
            return
        try:
            file = open(path / LOCK, "a", encoding="utf-8")  # noqa: SIM115  # closed with the process
        except OSError as error:
            raise UserError(f"the run folder {self.path} cannot be written to: {error.strerror}.") from None
        try:
            import fcntl  # here, since Windows has none

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise UserError(
                f"another process is at work in {self.path}: wait for it, or end it, before you --resume."
            ) from None
        except (ImportError, OSError):  # a file system without locks
            pass
        _locks[path] = file

    def settings(self) -> dict[str, Any]:
        """The settings that the run was started with."""
        return yaml.safe_load((self.path / CONFIG).read_text(encoding="utf-8")) or {}

    def learning_rate(self) -> dict[str, Any] | None:
        """What `start` wrote down of the learning rate; `None` in the folder of an older version, which wrote none."""
        path = self.path / RATE
        return json.loads(path.read_text(encoding="utf-8")) if _is_json(path) else None

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append one line to the metrics."""
        with open(self.path / METRICS, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of the metrics; a line torn by a crash is left out."""
        lines = []
        if (self.path / METRICS).exists():
            for line in (self.path / METRICS).read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    continue
        return lines

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end (`trainer_state.json` is its last file)."""
        checkpoints = [
            (int(folder.name.rpartition("-")[2]), folder)
            for folder in self.path.glob("checkpoint-*")
            if folder.name.rpartition("-")[2].isdigit() and _is_json(folder / "trainer_state.json")
        ]
        return max(checkpoints)[1] if checkpoints else None

    def best(self) -> dict[str, float] | None:
        """Step and accuracy of the policy that was best on the way; `None`: none was kept."""
        path = self.path / BEST / "best.json"
        return json.loads(path.read_text(encoding="utf-8")) if _is_json(path) else None

    def is_best(self, accuracy: float) -> bool:
        """Whether an accuracy is above that of the policy that was kept."""
        best = self.best()
        return best is None or accuracy > best["accuracy"]

    def note_best(self, step: int, accuracy: float) -> None:
        """Write down of which step the policy in `best` is."""
        write_whole(self.path / BEST / "best.json", json.dumps({"step": step, "accuracy": accuracy}) + "\n")

    def rewind(self, step: int) -> None:
        """Forget metrics after `step`, which a resumed run measures again."""
        lines = [line for line in self.metrics() if line["step"] <= step]
        write_whole(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in lines))

    def score_before(self) -> tuple[float, str] | None:
        """The score before the first step and its text for the reader; `None`: it was not measured yet."""
        for line in self.metrics():
            for key in ("held_out/accuracy", "held_out/return"):
                if line["step"] == 0 and key in line:
                    text = line.get("before")
                    return line[key], text if isinstance(text, str) else f"{line[key]:.4g}"
        return None

    def rewards(self, key: str) -> list[float]:
        """The mean training reward of each step that has a line of metrics; NaN where no completion had a score.

        Args:
            key: What the metrics call the reward.
        """
        lines = [line[key] for line in self.metrics() if key in line]
        return [float(reward) if isinstance(reward, (int, float)) else math.nan for reward in lines]

    def finish(self, result: TrialResult, facts: Mapping[str, Any]) -> None:
        """Write the result and let go of the folder.

        Args:
            result: What the run reached.
            facts: What it was reached by: the learning rate, say.
        """
        values = {**result.as_dict(), **facts}
        known = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
        write_whole(self.path / RESULT, json.dumps(known, indent=2, ensure_ascii=False) + "\n")
        if (file := _locks.pop(self.path.resolve(), None)) is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            file.close()

    def result(self) -> TrialResult | None:
        """The result, or `None` where the run has not ended."""
        if not _is_json(self.path / RESULT):
            return None
        values = json.loads((self.path / RESULT).read_text(encoding="utf-8"))
        if "status" not in values:
            return self._old_result(values)
        known = {f.name: values[f.name] for f in fields(TrialResult)}
        return TrialResult.from_dict({k: math.nan if v is None else v for k, v in known.items()})

    def _old_result(self, values: Mapping[str, Any]) -> TrialResult:
        """The result that a version before 0.2 wrote."""
        metrics = self.metrics()
        steps = max((line["step"] for line in metrics), default=0)
        rewards = self.rewards("reward") or self.rewards("rollout/ep_rew_mean")
        measured = self.score_before()
        before = values.get("held_out/before", values.get("before", measured[0] if measured else math.nan))
        before, after = before["mean"] if isinstance(before, dict) else before, values.get("held_out/after")
        if after is None:
            return TrialResult.of_divergence(before, steps, values.get("seconds", 0.0), values.get("reason", ""))
        error = values.get("held_out/standard_error", math.nan)
        if isinstance(after, dict):  # of PPO
            after, error = after["mean"], after["std"] / after["episodes"] ** 0.5
        result = TrialResult.of_training(after, error, before, rewards, steps, values.get("seconds", 0.0))
        return result.with_status(Status.WORSE if values["diverged"] else Status.OK, "")


def open_run(
    resume: str | None, output_dir: str | None, name: str, settings: dict[str, Any], rate: dict[str, Any] | None = None
) -> tuple[RunFolder, Path | None]:
    """A new run folder with its settings written down, or the one to resume with its last checkpoint.

    Args:
        resume: The folder to resume, or `None` for a new one.
        output_dir: The path of a new folder; `None`: one under `runs/`, called after `name`.
        name: Algorithm, task and rank; what a file name cannot hold is replaced.
        settings: The settings that were given. Paths in them are made whole, so that the run resumes from any folder.
        rate: The learning rate, which a new run writes down.

    Raises:
        UserError: As `RunFolder.create`, `open`, `start` and `lock`.
    """
    if resume is None:
        run = RunFolder.create(output_dir, folder_name(name))
        run.start({**with_whole_paths(settings), "output_dir": str(run.path.resolve())}, rate)
        run.lock()
        return run, None
    run = RunFolder.open(resume)
    run.lock()
    run.reopen({**settings, "output_dir": str(run.path.resolve())})
    checkpoint = run.last_checkpoint()
    run.rewind(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    print(f"resuming {run.path} from {checkpoint.name if checkpoint else 'the start: it has no checkpoint yet'}")
    return run, checkpoint


def is_adapter(folder: str) -> bool:
    """Whether a folder is an adapter that PEFT has saved, and no run's."""
    path = Path(folder)
    return (path / ADAPTER_CONFIG).exists() and not (path.resolve().parent / CONFIG).exists()


def folder_name(name: str) -> str:
    """A name with what a file name cannot hold replaced."""
    return re.sub(r"[^\w.-]+", "-", name)


def with_whole_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that mean the same from any folder."""
    paths = {k: str(Path(str(v)).resolve()) for k, v in settings.items() if k in PATHS and Path(str(v)).exists()}
    return {**settings, **paths}


def start_wandb(run: RunFolder, **options: Any) -> None:
    """Begin a run at Weights & Biases; a resumed run goes on there under the id in its folder.

    Args:
        run: The folder of the run, which keeps the id.
        options: Options of `wandb.init`.

    Raises:
        UserError: Weights & Biases cannot be used.
    """
    import wandb

    path = run.path / WANDB_ID
    identity = path.read_text(encoding="utf-8").strip() if path.exists() else None
    try:
        started = wandb.init(**{"name": run.path.name, **options}, id=identity, resume="allow")
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases cannot be used ({one_line(error)}): see wandb login, or set WANDB_MODE=offline."
        ) from None
    path.write_text(f"{started.id}\n", encoding="utf-8")


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
