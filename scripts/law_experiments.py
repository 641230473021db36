"""The runs of docs/predictions.md on one GPU: a queue of jobs, several at a time, each with a CSV of its own.

    setsid nohup python scripts/law_experiments.py run --minutes 24 > runs/law/driver.log 2>&1 &
    python scripts/law_experiments.py status
    python scripts/law_experiments.py pack OUT             # one small archive, at any time
    python scripts/law_experiments.py run --trial --only e1-embedded e2-r1     # a few steps of the embedded model

A job that fails is tried once more at the end of the queue; runs that its CSV has are not repeated. No job is started
that is not expected to end in time.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("runs/law")
SMOLLM2, GEMMA, QWEN05, QWEN15 = (f"/tmp/{name}" for name in ("smollm2", "gemma270", "qwen05", "qwen15"))
GSM8K = "/tmp/gsm8k"
GRACE = 0.7
"""Share of a job's expected time that must be left for it to be started."""


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: Of its files.
        script: In scripts/.
        arguments: But for the output.
        minutes: That it is expected to take beside others.
        needs: Folders without which it is left out.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    minutes: float
    needs: tuple[str, ...] = ()


def probe(name: str, model: str, task: str = "arithmetic", minutes: float = 1.5) -> Job:
    """E1 of a model."""
    return Job(f"e1-{name}", "law_probe.py", ("--model", model, "--task", task), minutes, (model,))


def grpo(name: str, minutes: float, *curves: str, more: tuple[str, ...] = (), flags: tuple[str, ...] = ()) -> Job:
    """Arms on SmolLM2."""
    arguments = ["--model", SMOLLM2, "--name", "smollm2", *more]
    for curve in curves:
        arguments += ["--curve", curve]
    return Job(name, "law_grpo.py", (*arguments, *(("--", *flags) if flags else ())), minutes, (SMOLLM2,))


def sft(name: str, optimizer: str, *curves: str) -> Job:
    """E6 with an optimizer."""
    arguments = ["--model", SMOLLM2, "--name", "smollm2", "--optimizer", optimizer]
    for curve in curves:
        arguments += ["--curve", curve]
    return Job(name, "law_sft.py", tuple(arguments), 2.5, (SMOLLM2,))


def gsm8k(name: str, minutes: float, *curves: str) -> Job:
    """E8: shorter steps, for completions are long."""
    arguments = ["--model", QWEN05, "--name", "qwen05", "--task", f"gsm8k:{GSM8K}", "--steps", "40"]
    arguments += ["--completions", "128", "--micro-batch", "64", "--at-once", "128"]
    for curve in curves:
        arguments += ["--curve", curve]
    flags = ("--max_completion_length", "224", "--held_out_problems", "128")
    return Job(name, "law_grpo.py", (*arguments, "--", *flags), minutes, (QWEN05, GSM8K))


LONG = ("--steps", "240", "--label", "240-steps")
WARM = ("--label", "warmup-20")
JOBS = [
    probe("smollm2", SMOLLM2),
    grpo("e2-r1", 4.5, "B,1,1:-11.5:-8:0.5:1+2"),
    grpo("e2-r4", 4.5, "B,4,1:-12.5:-9:0.5:1+2"),
    grpo("e3-seed1", 6, "peft,8,32/r:-13:-8:1:1", "peft,32,32/r:-13:-8:1:1", "peft,128,32/r:-13:-8:1:1"),
    grpo("e9-bf16", 5, "full-bf16:-16:-11:1:1", "full-bf16:-14.5:-12.5:1:1"),
    grpo("e9-mlp", 6, "full-mlp:-16:-12:1:1", "full:-16:-13:1:1", "full-mlp:-14.5:-13.5:1:1", "full:-14.5:-14.5:1:1"),
    probe("gemma270", GEMMA),
    probe("qwen05", QWEN05),
    probe("qwen15", QWEN15, minutes=2.5),
    grpo("e7-r4", 6, "B,4,1:-13:-9:1:1", more=LONG),
    grpo("e7-r64", 6, "B,64,1:-15:-11:1:1", more=LONG),
    grpo("e7-r256", 7, "B,256,1:-16:-12:1:1", more=LONG),
    grpo("e7-full", 7, "full:-17:-13:1:1", more=LONG),
    grpo("e2-r2", 4.5, "B,2,1:-12:-8.5:0.5:1+2"),
    grpo("e4-warmup", 4, "A,16,1/r:-8.5:-4.5:1:1", "B,16,1:-13:-9:1:1", more=WARM, flags=("--warmup_steps", "20")),
    grpo("e4-base", 3, "A,16,1/r:-7.5:-4.5:1:1", "B,16,1:-13:-9:1:1", more=("--label", "warmup-3")),
    sft("e6-adamw", "adamw", "B,4,1:-13:-7:1:1+2", "B,64,1:-15:-9:1:1+2"),
    sft("e6-sgd", "sgd", "B,4,1:-14:2:1:1", "B,64,1:-14:2:1:1"),
    grpo("e3-seed2", 6, "peft,8,32/r:-12.5:-8.5:1:2", "peft,32,32/r:-12.5:-8.5:1:2", "peft,128,32/r:-12.5:-8.5:1:2"),
    grpo("e9-seed2", 5, "full-bf16:-15:-12:1:2", "full-mlp:-15:-13:1:2", "full:-15.5:-14.5:1:2"),
    probe("qwen05-gsm8k", QWEN05, f"gsm8k:{GSM8K}", 2),
    gsm8k("e8-r64", 7, "B,64,1:-15:-11:1:1"),
    gsm8k("e8-r4", 7, "B,4,1:-13:-9:1:1"),
    gsm8k("e8-full", 9, "full:-17:-13:1:1"),
]
"""In the order of their worth; the longest that are worth it begin early."""


def command(job: Job, folder: Path, trial: bool) -> list[str]:
    """Of a job; in a trial, of a few steps of the embedded model at the first learning rate of each curve."""
    arguments = list(job.arguments)
    if trial:
        for i, word in enumerate(arguments):
            if arguments[i - 1] == "--curve":
                curve, first, _, step, seeds = word.split(":")
                arguments[i] = ":".join([curve, first, first, step, seeds.split("+")[0]])
            elif arguments[i - 1] == "--model":
                arguments[i] = "embedded"
            elif arguments[i - 1] == "--task":
                arguments[i] = "arithmetic"
            elif arguments[i - 1] == "--max_completion_length":
                arguments[i] = "8"
        small = ["--batches", "2"] if job.script == "law_probe.py" else ["--steps", "2"]
        at = arguments.index("--") if "--" in arguments else len(arguments)
        arguments[at:at] = small
    at = arguments.index("--") if "--" in arguments else len(arguments)
    arguments[at:at] = ["--output", str(folder / f"{job.name}.csv")]
    return [sys.executable, str(Path(__file__).parent / job.script), *arguments]


class Queue:
    """What is to run, who runs it, and how it went.

    Args:
        jobs: In order.
        folder: Of all files.
        minutes: Until all must have ended.
        trial: See `command`.
    """

    def __init__(self, jobs: list[Job], folder: Path, minutes: float, trial: bool) -> None:
        self.waiting, self.folder, self.trial = list(jobs), folder, trial
        self.start, self.seconds = time.monotonic(), minutes * 60
        self.lock = threading.Lock()
        self.failed: set[str] = set()

    def work(self) -> None:
        """Run one job after another until none is left that fits."""
        while job := self.take():
            self.log(job, "begins")
            with open(self.folder / f"{job.name}.log", "a", encoding="utf-8") as log:
                began = time.monotonic()
                code = subprocess.run(command(job, self.folder, self.trial), stdout=log, stderr=log).returncode
            self.log(job, "ended" if code == 0 else f"failed with code {code}", seconds=round(time.monotonic() - began))
            if code:
                with self.lock:
                    if job.name not in self.failed:
                        self.failed.add(job.name)
                        self.waiting.append(job)

    def take(self) -> Job | None:
        """The next job for which there is time and what it needs."""
        with self.lock:
            while self.waiting:
                job = self.waiting.pop(0)
                left = self.seconds - (time.monotonic() - self.start)
                lacking = [] if self.trial else [folder for folder in job.needs if not Path(folder).is_dir()]
                if lacking:
                    self.log(job, f"left out: there is no {', '.join(lacking)}")
                elif left < GRACE * job.minutes * 60:
                    self.log(job, f"left out: {left:.0f} s are left")
                else:
                    return job
        return None

    def log(self, job: Job, event: str, **more: object) -> None:
        """One line for what happened."""
        line = {"at": round(time.monotonic() - self.start), "job": job.name, "event": event, **more}
        with open(self.folder / "jobs.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        print(line, flush=True)


def run(options: argparse.Namespace) -> None:
    """Work through the queue."""
    options.folder.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in JOBS if not options.only or any(job.name.startswith(name) for name in options.only)]
    queue = Queue(jobs, options.folder, options.minutes, options.trial)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.workers)))
    workers = [threading.Thread(target=queue.work) for _ in range(options.workers)]
    for worker in workers:
        worker.start()
        time.sleep(options.stagger)
    for worker in workers:
        worker.join()
    print("all jobs have ended", flush=True)


def status(options: argparse.Namespace) -> None:
    """The last line of every job's log beside what the driver knows."""
    events: dict[str, dict] = {}
    if (options.folder / "jobs.jsonl").exists():
        for line in (options.folder / "jobs.jsonl").read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            events[event["job"]] = event
    for name, event in events.items():
        log = options.folder / f"{name}.log"
        text = log.read_text(errors="replace", encoding="utf-8") if log.exists() else ""
        last = (text.strip().splitlines() or [""])[-1]
        print(f"{event['at']:>5} s {name}: {event['event']} | {last[:150]}")


def pack(options: argparse.Namespace) -> None:
    """All files of the folder in one archive."""
    options.out.mkdir(parents=True, exist_ok=True)
    archive = options.out / "law.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for file in sorted(options.folder.glob("*.*")):
            tar.add(file, arcname=f"law/{file.name}")
    print(f"{archive}: {archive.stat().st_size / 2**20:.2f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--minutes", type=float, default=24.0)
    runner.add_argument("--workers", type=int, default=5)
    runner.add_argument("--stagger", type=float, default=3.0, help="seconds between the workers' first jobs")
    runner.add_argument("--only", nargs="*", default=[], help="beginnings of names")
    runner.add_argument("--trial", action="store_true")
    commands.add_parser("status")
    commands.add_parser("pack").add_argument("out", type=Path)
    options = parser.parse_args()
    {"run": run, "status": status, "pack": pack}[options.command](options)


if __name__ == "__main__":
    main()
