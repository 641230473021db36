"""`python -m mua_rl.sweep`: what it is asked, how it runs trials, what it leaves; most runs are made up."""

import importlib
import io
import json
import math
import re
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
import torch
from helpers import make_record, make_trial, spec
from rich.console import Console

from mua_rl.analysis import rows
from mua_rl.errors import NoRate, UserError
from mua_rl.exits import ExitCode
from mua_rl.grpo import arguments as grpo_arguments
from mua_rl.grpo.stacked import trainer as grpo
from mua_rl.grpo.stacked.checkpoint import Checkpoint, path_of
from mua_rl.lr.recipe import Recipe
from mua_rl.lr.record import LRRecord
from mua_rl.lr.spec import FFT
from mua_rl.run.folder import RunFolder
from mua_rl.run.trial import Status, TrialResult
from mua_rl.sweep import backend, single_runs
from mua_rl.sweep.arguments import parse, parse_scheme
from mua_rl.sweep.backend import environments
from mua_rl.sweep.facts import Facts, find_facts
from mua_rl.sweep.single_runs import SingleRuns, trial_flags
from mua_rl.sweep.stacked_runs import StackedRuns

command = importlib.import_module("mua_rl.sweep.run")
ARM = make_trial(8, "A", "1/r", -10.5, 43)


def facts(known=True, **changes):
    record = make_record(**changes)
    return Facts(Recipe.of(record), replace(record, learning_rate=2**-11), "a record", known)


class FakeRunner:
    """Runs trials of a hill whose top is at 2^-10.4 for LoRA and 2^-11.4 for FFT."""

    at_once = 1

    def __init__(self):
        self.trials = []

    def group(self, trial):
        return trial

    def run(self, trials):
        self.trials += trials
        return [self.respond(trial) for trial in trials]

    def respond(self, trial):
        top = -10.4 if trial.spec.rank else -11.4
        metric = 0.4 + 0.5 * math.exp(-(((trial.log2_lr - top) / 2.5) ** 2)) + 0.001 * trial.seed / 43
        return TrialResult(metric, 0.01, 0.4, 0.6, 0.7, Status.OK, "", 300, 2.0)


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """Runs the command in a folder with a fake runner; gives what was printed, the folder, and the runner."""
    monkeypatch.setattr(command, "find_facts", lambda request: facts())

    def run(*flags, runner=None):
        runner = runner or FakeRunner()
        monkeypatch.setattr(command, "choose_backends", lambda *_: [runner])
        console = Console(record=True, width=120, file=io.StringIO())
        folder = command.sweep(parse(["--output_dir", str(tmp_path / "out"), *flags]), console)
        return console.export_text(), folder, runner

    return run


def test_ranks_and_schemes_make_a_curve_each_and_full_finetuning_one():
    request = parse(["--ranks", "8", "64", "full", "--schemes", "B", "A/r", "--seeds", "3"])
    assert request.specs == [
        spec(8, "B", "1"),
        spec(8, "A", "1/r"),
        spec(64, "B", "1"),
        spec(64, "A", "1/r"),
        FFT,
    ]
    assert request.seeds == (42, 43, 44)
    assert parse(["--rank", "16", "--init", "A", "--alpha", "16/r"]).specs == [spec(16, "A", "16/r")]
    assert parse([]).specs == [spec(32, "B", "1")]


def test_schemes_are_read_as_people_write_them():
    assert [parse_scheme(text) for text in ("B", "a", "A/r", "B/sqrt(r)", "A*0.5", "A*16/r")] == [
        ("B", "1"), ("A", "1"), ("A", "1/r"), ("B", "1/sqrt(r)"), ("A", "0.5"), ("A", "16/r"),
    ]  # fmt: skip


def test_every_flag_of_the_trainer_is_passed_on_and_the_sweeps_own_are_not():
    request = parse(["--max_steps", "7", "--model", "smollm2", "--workers", "2", "--seed", "5", "--lr_from", "x"])
    assert request.trainer_settings == {"max_steps": 7, "model": "smollm2"}
    assert request.seeds == (5, 6)
    assert parse(["--max_steps", "300", "--init", "B"]).comparable() == parse([]).comparable() == {"algo": "grpo"}
    pytest.importorskip("stable_baselines3")
    request = parse(["--algo", "ppo", "--env_id", "CartPole-v1", "--n_epochs", "3", "--grid", "-9", "-7"])
    assert request.trainer_settings == {"env_id": "CartPole-v1", "n_epochs": 3}
    assert request.specs == [spec(8, "B", "1")]


def test_a_config_file_names_the_algorithm_and_flags_win(tmp_path):
    pytest.importorskip("stable_baselines3")
    (tmp_path / "c.yaml").write_text("algo: ppo\nranks: [4, full]\nseeds: 5\nenv_id: CartPole-v1\n")
    request = parse(["--config", str(tmp_path / "c.yaml"), "--seeds", "3"])
    assert (request.sweep.algo, request.task, request.sweep.seeds) == ("ppo", "CartPole-v1", 3)
    assert request.specs == [spec(4, "B", "1"), FFT]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no_such_flag", "1"], "no_such_flag"),
        (["--ranks", "eight"], "not 'eight'"),
        (["--ranks", "-4"], "not '-4'"),
        (["--ranks", "8", "--rank", "4"], "exclude each other"),
        (["--schemes", "C"], "not 'C'"),
        (["--schemes", "B", "--init", "A"], "give one or the other"),
        (["--grid", "-10", "-14"], "empty"),
        (["--grid", "-10"], "empty or none"),
        (["--grid", "1e-4", "1e-3"], "empty or none"),
        (["--resolution", "0"], "above 0"),
        (["--resolution", "nan"], "above 0"),
        (["--seeds", "0"], "at least 1"),
        (["--workers", "0"], "at least 1"),
        (["--time_limit", "-1"], "above 0"),
        (["--arms_memory", "0"], "above 0, not 0.0"),
        (["--arms_memory", "nan"], "above 0, not nan"),
        (["--arms_memory", "inf"], "above 0, not inf"),
        (["--algo", "ppo", "--arms_memory", "2"], "means nothing with --algo ppo"),
        (["--lr", "1e-3"], "drop --lr"),
        (["--algo", "dpo"], "takes grpo or ppo, not 'dpo'"),
        (["--rank_exponent", "1.5"], "--rank_exponent takes a number from 0"),
        (["--algo", "ppo", "--rank_exponent", "nan", "--grid", "-9", "-7"], "--rank_exponent takes a number from 0"),
        (["--resume", "/no/such/folder"], "no run folder"),
    ],
)
def test_what_cannot_be_used_is_one_clear_line(flags, message):
    with pytest.raises(UserError, match=message) as error:
        parse(flags)
    assert "\n" not in str(error.value)


def test_a_search_begins_around_the_records_rate_moved_by_the_rules_and_widely_where_they_are_silent():
    theory = parse(["--ranks", "8", "--rank_exponent", "0"])
    assert facts().search(spec(64, "B", "1"), theory).scan == (-13, -12, -11, -10, -9)
    assert facts().search(FFT, theory).scan == (-13, -12, -11, -10, -9)
    corrected = parse(["--ranks", "8", "--rank_exponent", "1"])
    assert facts().search(spec(32, "B", "1"), corrected).scan == (-15, -14, -13, -12, -11)
    assert facts(scheme="Init[A]").search(spec(32, "A", "1"), theory).scan == (-14, -13, -12, -11, -10)  # r^-1/2
    wide = facts().search(spec(8, "A", "1"), theory)  # between Init[B] and Init[A] only exponents are known
    assert (wide.step, len(wide.scan)) == (2, 5)
    assert facts(known=False).search(spec(8, "B", "1"), theory).scan == (-15, -13, -11, -9, -7)
    assert facts().search(spec(8, "B", "1"), parse(["--grid", "-8", "-6"])).scan == (-8, -7, -6)


def test_facts_of_a_study_that_an_earlier_version_began_are_read():
    old, placeholder = facts(other_learning_rates={"head": 2**-10, "x": 0.5}), math.nextafter(1e-3, 1.0)
    template = make_record(learning_rate=placeholder, other_learning_rates={"head": placeholder, "x": 0.5})
    data = {**asdict(old), "template": asdict(template)}
    del data["recipe"]
    assert Facts.from_dict(json.loads(json.dumps(data))) == old


def test_facts_survive_json():
    assert Facts.from_dict(json.loads(json.dumps(asdict(facts())))) == facts()


def test_a_sweep_ends_with_csv_report_figure_and_a_record_of_the_first_lora_curve(sweep):
    text, folder, runner = sweep("--ranks", "full", "8")
    record = LRRecord.load(folder)
    assert (record.rank, record.scheme, record.seeds) == (8, "Init[B]", [42, 43])
    assert math.log2(record.learning_rate) == pytest.approx(-10.4, abs=0.35)
    assert record.metric["before"] == 0.4
    assert record.metric["after"] == pytest.approx(0.9, abs=0.03)
    assert "interval" in record.note
    assert {row.trial for row in rows.read(folder / "sweep.csv")} == set(runner.trials)
    assert (folder / "report.md").exists()
    assert list(folder.glob("*-curves.png"))
    assert f"--rank full --lr_from {folder}" in text
    assert "Init[B] α=1 r=8" in text


def test_the_command_after_a_sweep_is_accepted_and_trains_on_what_the_sweep_was_about(sweep, tmp_path):
    (tmp_path / "my model").mkdir()
    own = ["--model", str(tmp_path / "my model"), "--target_modules", "(.*[kq]_proj|up)", "--seed", "5"]
    own += ["--max_steps", "7", "--lr_from", str(tmp_path), "--ranks", "8", "--seeds", "1"]
    text, folder, _ = sweep(*own, "--output_dir", str(tmp_path / "a sweep"))
    line = re.search("python -m mua_rl.grpo (.*)", text)[1]
    arguments, adapter, given = grpo_arguments.parse(shlex.split(line))
    assert (arguments.model, arguments.max_steps, arguments.seed) == (str(tmp_path / "my model"), 7, 5)
    assert (adapter.rank, adapter.lr_from, adapter.target_modules) == ("full", str(folder), ["(.*[kq]_proj|up)"])
    assert given.keys() == {"model", "max_steps", "seed", "rank", "lr_from", "target_modules"}


def test_a_record_that_a_sweep_wrote_gives_other_runs_their_rate(sweep):
    _, folder, _ = sweep()
    again = parse(["--lr_from", str(folder)])
    assert again.adapter.lr_from == str(folder)
    assert LRRecord.load(folder).configuration().rank == 32


@pytest.mark.slow
def test_the_same_command_goes_on_and_repeats_nothing_and_more_ranks_can_be_added(sweep):
    _, _, first = sweep("--ranks", "8")
    _, _, second = sweep("--ranks", "8")
    assert first.trials
    assert second.trials == []
    _, folder, third = sweep("--ranks", "8", "full")
    assert {trial.spec.rank for trial in third.trials} == {None}
    assert len(rows.read(folder / "sweep.csv")) == len(first.trials) + len(third.trials)


def test_resume_takes_the_sweeps_own_settings(sweep, tmp_path):
    _, folder, first = sweep("--ranks", "8", "--max_steps", "9", "--time_limit", "1e-9")
    assert first.trials == []
    request = parse(["--resume", str(folder)])
    assert request.specs == [spec(8, "B", "1")]
    assert request.trainer_settings == {"max_steps": 9}
    with pytest.raises(UserError, match="drop max_steps"):
        parse(["--resume", str(folder), "--max_steps", "5"])


@pytest.mark.slow
def test_resume_goes_on_with_the_ranks_that_a_later_command_added(sweep):
    sweep("--ranks", "8")
    _, folder, _ = sweep("--ranks", "8", "full", "--time_limit", "1e-9")
    assert parse(["--resume", str(folder)]).specs == [spec(8, "B", "1"), FFT]


def test_runs_in_a_folder_are_never_read_into_a_study_of_other_settings(sweep):
    sweep("--max_steps", "9")
    with pytest.raises(UserError, match="max_steps: 9 → 10"):
        sweep("--max_steps", "10", "--study_name", "another")
    sweep("--max_steps", "9", "--study_name", "another")


def test_time_that_is_up_is_said_and_leaves_no_record(sweep):
    text, folder, _ = sweep("--time_limit", "1e-9")
    assert "Time is up" in text
    assert not (folder / "lr_record.json").exists()


def test_other_settings_and_other_folders_are_refused(sweep, tmp_path):
    sweep("--max_steps", "9")
    with pytest.raises(UserError, match="max_steps: 9 → 10"):
        sweep("--max_steps", "10")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        sweep("--output_dir", str(tmp_path / "notes"))
    RunFolder.create(str(tmp_path / "run"), "x").start({"rank": "8"})
    with pytest.raises(UserError, match="something else"):
        sweep("--output_dir", str(tmp_path / "run"))
    with pytest.raises(UserError, match="no sweep"):
        parse(["--resume", str(tmp_path / "run")])


def test_a_sweep_that_cannot_begin_leaves_nothing_behind(sweep, monkeypatch, tmp_path):
    def refuse(request):
        raise UserError("there is no such task")

    monkeypatch.setattr(command, "find_facts", refuse)
    with pytest.raises(UserError, match="no such task"):
        sweep()
    assert not (tmp_path / "out").exists()


def test_diverged_and_stopped_runs_are_named_and_never_the_record(sweep):
    class Breaking(FakeRunner):
        def respond(self, trial):
            if trial.log2_lr > -11:
                return TrialResult.of_divergence(0.4, 10, 1.0, "the gradient was not finite")
            good = super().respond(trial)
            return good if trial.log2_lr > -13 else good.with_status(Status.STOPPED, "far behind its peers")

    text, folder, _ = sweep("--ranks", "8", runner=Breaking())
    assert "diverged, or got worse, at 2^-10, 2^-9" in text
    assert "stopped early at 2^-13" in text
    assert -13 < math.log2(LRRecord.load(folder).learning_rate) <= -10


def test_a_sweep_in_which_nothing_learns_writes_no_record_and_its_report_states_no_optimum(sweep, tmp_path):
    class Useless(FakeRunner):
        def respond(self, trial):
            if trial.log2_lr < -5:
                return replace(super().respond(trial), score=0.4)
            return replace(super().respond(trial), score=0.1, status=Status.WORSE)

    with pytest.raises(NoRate, match="found no learning rate for Init"):
        sweep(runner=Useless())
    folder = tmp_path / "out"
    report = (folder / "report.md").read_text()
    assert "no run got better than the base" in report
    assert not list(folder.glob("*.png"))
    assert ".png" not in report
    assert not (folder / "lr_record.json").exists()


@pytest.mark.parametrize("rate", [1e-3, 2e-3])
def test_a_heads_given_rate_is_never_taken_for_one_that_follows_the_rest(rate):
    recipe = find_facts(parse(["--algo", "ppo", "--head_lr", str(rate)])).recipe
    assert recipe.other_learning_rates == {"head": rate}
    assert recipe.record(FFT, rate / 2, (0.0, 1.0), [1], "sweep", "", 10).other_learning_rates == {"head": rate}


def test_a_record_of_runs_by_epochs_says_how_many_steps_these_were(sweep, monkeypatch):
    monkeypatch.setattr(command, "find_facts", lambda request: facts(schedule={"name": "cosine", "steps": -1}))
    _, folder, _ = sweep()
    assert LRRecord.load(folder).schedule == {"name": "cosine", "steps": 300}


def test_a_head_without_a_rate_of_its_own_gets_the_tuned_one(sweep, monkeypatch):
    monkeypatch.setattr(command, "find_facts", lambda request: facts(other_learning_rates={"head": 2**-10, "x": 0.5}))
    _, folder, _ = sweep()
    record = LRRecord.load(folder)
    assert record.other_learning_rates == {"head": record.learning_rate, "x": 0.5}


TRAINER = """
import json, os, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = flags.get("--output_dir") or flags["--resume"]

def log(step, **values):
    with open(folder + "/metrics.jsonl", "a") as stream:
        stream.write(json.dumps({{"step": step, **values}}) + chr(10))

def finish(**result):
    with open(folder + "/result.json", "w") as stream:
        json.dump(result, stream)

if "--resume" not in flags:
    os.mkdir(folder)
    with open(folder + "/flags.json", "w") as stream:
        json.dump(flags, stream)
{body}
"""
GOOD = """
log(0, **{"held_out/accuracy": 0.4})
for step in range(1, 21):
    log(step, reward=0.4 + step / 100, loss=0.0)
finish(**{"diverged": False, "held_out/before": 0.4, "held_out/after": 0.75, "held_out/standard_error": 0.02})
os.mkdir(folder + "/adapter")
os.mkdir(folder + "/checkpoint-20")
"""


@pytest.fixture
def single(tmp_path, monkeypatch):
    """`SingleRuns` whose trainer is a script of a few lines."""

    script, popen = tmp_path / "trainer.py", subprocess.Popen

    def start(arguments, **options):
        assert arguments[:3] == [sys.executable, "-m", "mua_rl.grpo"]
        return popen([sys.executable, str(script), *arguments[3:]], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(single_runs, "POLL_SECONDS", 0.05)

    def make(body, *flags, stop=None):
        script.write_text(TRAINER.format(body=body))
        request = parse(["--max_steps", "20", *flags])
        return SingleRuns(request, tmp_path, {"MUA_TEST": "1"}, stop or threading.Event())

    return make


def test_a_single_run_is_asked_for_its_trial_and_read_into_an_outcome(single, tmp_path):
    [outcome] = single(GOOD).run([ARM])
    assert (outcome.score, outcome.standard_error, outcome.before, outcome.steps) == (0.75, 0.02, 0.4, 20)
    assert outcome.reward_mean == pytest.approx(0.505)
    assert outcome.reward_last == pytest.approx(0.595)
    assert outcome.status is Status.OK
    folder = tmp_path / "runs" / "r8-A-1-r-lr-10.5-s43"
    asked = json.loads((folder / "flags.json").read_text())
    assert asked["--lr"] == repr(2**-10.5)
    assert (asked["--rank"], asked["--init"], asked["--alpha"], asked["--seed"]) == ("8", "A", "1/r", "43")
    assert not (folder / "adapter").exists()
    assert not (folder / "checkpoint-20").exists()


def test_weights_are_kept_where_that_is_asked_for(single, tmp_path):
    single(GOOD, "--keep_weights", "true").run([ARM])
    assert (tmp_path / "runs" / ARM.name / "adapter").exists()


def test_a_run_that_had_ended_is_read_and_not_repeated(single):
    first = single(GOOD).run([ARM])
    [again] = single("raise SystemExit(9)").run([ARM])
    assert replace(again, seconds=0) == replace(first[0], seconds=0)


def test_a_run_that_was_cut_off_starts_anew_or_goes_on_from_its_checkpoint(single, tmp_path):
    folder = tmp_path / "runs" / ARM.name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    assert single(GOOD).run([ARM])[0].score == 0.75
    (folder / "result.json").unlink()
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "trainer_state.json").write_text("{}")
    on = 'assert flags == {"--resume": folder}'
    on += '\nfinish(**{"diverged": False, "held_out/after": 0.8, "held_out/standard_error": 0.1})'
    assert single(on).run([ARM])[0].score == 0.8


def test_a_diverged_run_is_an_outcome_and_a_failed_one_an_error_with_the_logs_last_lines(single, tmp_path):
    diverged = 'finish(**{"diverged": True, "reason": "nan in step 3", "held_out/before": 0.4})\nsys.exit(3)'
    [outcome] = single(diverged).run([ARM])
    assert outcome.status is Status.DIVERGED
    assert math.isnan(outcome.score)
    assert (outcome.reason, outcome.before) == ("nan in step 3", 0.4)
    failing = 'print("CUDA out of memory")\nsys.exit(1)'
    with pytest.raises(UserError, match=r"code 1.*CUDA out of memory"):
        single(failing).run([replace(ARM, seed=44)])


def test_a_hopeless_run_is_ended_early(single):
    body = """
for step in range(1, 13):
    log(step, reward=0.5 - 0.02 * step, loss=0.0)
time.sleep(60)
"""
    [outcome] = single(body).run([ARM])
    assert outcome.reason.startswith("the reward fell")
    assert outcome.status is Status.STOPPED
    assert outcome.steps == 12
    assert outcome.seconds < 30


def test_a_sweep_that_ends_ends_its_runs(single):
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(backend.Stopped):
        single("time.sleep(60)", stop=stop).run([ARM])


def test_a_result_of_ppo_is_read_too(tmp_path):
    run = RunFolder.create(str(tmp_path / "run"), "x")
    run.log(0, {"held_out/return": 16.0})
    run.log(1024, {"rollout/ep_rew_mean": 20.0})
    returns = {"mean": 400.0, "std": 20.0, "iqm": 410.0, "episodes": 16}
    old = {"diverged": False, "held_out/before": {"mean": 16.0}, "held_out/after": returns, "seconds": 3.0}
    (run.path / "result.json").write_text(json.dumps(old))  # as versions before 0.2 wrote it
    outcome = run.result()
    assert (outcome.score, outcome.standard_error, outcome.before, outcome.steps) == (400.0, 5.0, 16.0, 1024)
    assert (outcome.reward_mean, outcome.seconds) == (20.0, 3.0)


def test_trials_have_names_and_flags_of_their_own():
    specs = [spec(8, "A", "1"), spec(8, "B", "1/r"), FFT]
    trials = [ARM, *(replace(ARM, spec=other) for other in specs), replace(ARM, log2_lr=-10.0)]
    assert len({trial.name for trial in trials}) == len(trials)
    assert trial_flags(replace(ARM, spec=FFT)) == ["--rank", "full", "--lr", repr(2**-10.5), "--seed", "43"]


def test_workers_share_out_cores_and_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(backend.os, "cpu_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments(3)] == ["2", "5", "2"]
    assert {e["OMP_NUM_THREADS"] for e in environments(3)} == {"2"}
    assert "CUDA_VISIBLE_DEVICES" not in environments(1)[0]


@pytest.mark.parametrize("own_process", [False, True])
def test_grpo_trials_get_their_memory_and_go_on_with_those_of_their_step(tmp_path, monkeypatch, own_process):
    asked = []
    monkeypatch.setattr(grpo, "train_side_by_side", lambda *_, **options: asked.append(options) or [])
    request = parse(["--arms_memory", "2.5", "--max_steps", "20"])
    stacked = StackedRuns(request, tmp_path, environment={} if own_process else None)
    if own_process:
        stacked.pool.shutdown()
        stacked.pool = ThreadPoolExecutor(1)
    trials = [replace(ARM, log2_lr=-k) for k in range(4)]
    for trial, step in zip(trials, (10, 10, 5), strict=False):
        path = path_of(tmp_path / "runs", trial)
        path.parent.mkdir(exist_ok=True)
        torch.save(vars(Checkpoint(trial.as_dict(), {}, step, 0.4, None, {})), path)
    assert [stacked.group(trial) == stacked.group(trials[0]) for trial in trials] == [
        True,
        True,
        False,
        False,
    ]
    stacked.run(trials[:2])
    assert (asked[0]["memory"], asked[0]["checkpoints"]) == (2.5, tmp_path / "runs")


def run_command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "mua_rl.sweep", *map(str, flags)], capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow
def test_the_command_says_in_one_line_what_is_wrong(tmp_path):
    run = run_command("--ranks", "many")
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith("mua_rl: error: --rank takes")
    assert "Traceback" not in run.stderr


TINY = ["--seeds", "1", "--max_steps", "2", "--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1"]
TINY += ["--held_out_problems", "16", "--held_out_steps", "0", "--report_to", "none"]


@pytest.mark.slow
@pytest.mark.parametrize("side_by_side", ["on", "off"])
def test_a_grpo_sweep_from_command_to_record(tmp_path, side_by_side):
    out = tmp_path / "out"
    run = run_command("--ranks", 4, "--grid", -5, -4, "--side_by_side", side_by_side, "--output_dir", out, *TINY)
    assert run.returncode == ExitCode.NO_RATE, run.stderr  # two steps teach nothing
    assert "found no learning rate for Init[B]" in run.stderr
    table = rows.read(out / "sweep.csv")
    assert {row.trial.log2_lr for row in table} >= {-5, -4}
    assert {row.result.steps for row in table} == {2}
    assert len({row.result.before for row in table}) == 1
    logs = list((out / "runs").glob("*.log"))
    assert len(logs) == (0 if side_by_side == "on" else len(table))
    assert "search begins around the shipped record" in run.stdout


@pytest.mark.slow
def test_a_grpo_sweep_that_is_killed_goes_on_within_its_trials(tmp_path):
    out, steps = tmp_path / "out", ["--max_steps", 40, "--save_steps", 4, "--early_stop", "false"]
    flags = ["--ranks", 4, "--grid", -6, -4, *TINY, *steps, "--output_dir", out]
    process = subprocess.Popen([sys.executable, "-m", "mua_rl.sweep", *map(str, flags)])
    while len(list((out / "runs").glob("r4-*.pt"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    run = run_command("--resume", out)
    assert run.returncode in (ExitCode.OK, ExitCode.NO_RATE), run.stderr
    assert "3 trials go on from step" in run.stdout
    assert {row.trial.log2_lr for row in rows.read(out / "sweep.csv")} >= {-6, -5, -4}
    assert not list((out / "runs").glob("*.pt"))


@pytest.mark.slow
def test_a_ppo_sweep_from_command_to_record_and_on_to_full_finetuning(tmp_path):
    pytest.importorskip("stable_baselines3")
    out, steps = tmp_path / "out", ["--total_timesteps", "8192", "--eval_episodes", "8"]
    run = run_command("--algo", "ppo", "--ranks", 4, "--grid", -7, -6, "--seeds", 1, "--output_dir", out, *steps)
    assert run.returncode == 0, run.stderr
    record = LRRecord.load(out)
    assert (record.algorithm, record.rank, record.widths) == ("ppo", 4, [128])
    assert record.other_learning_rates == {"head": record.learning_rate}
    ppo = importlib.import_module("mua_rl.ppo.run")
    arguments, adapter, given = importlib.import_module("mua_rl.ppo.arguments").parse(
        ["--rank", "full", "--lr_from", str(out), *steps]
    )
    assert ppo.set_up(arguments, adapter).rate.value == record.learning_rate
    assert given["rank"] == "full"
