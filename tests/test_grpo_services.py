"""What a GRPO run has to do with the hub and with Weights & Biases, both made up: neither costs it what it has."""

import shutil
import subprocess
import sys
from concurrent.futures import Future
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import httpx
import pytest
from transformers import trainer
from trl.extras import profiling
from trl.trainer import base_trainer, grpo_trainer

from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse
from mua_rl.lr.record import LRRecord
from mua_rl.run import hub
from mua_rl.run.folder import RunFolder

SMALL = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--held_out_steps", "0"]
SMALL += ["--held_out_problems", "8", "--max_completion_length", "6", "--rank", "4", "--lr", "1e-9", "--max_steps", "2"]


def run(*flags):
    return grpo.train(*parse([*SMALL, "--report_to", "none", *map(str, flags)]))


class Hub:
    """A hub with a fault at some call."""

    def __init__(self, fault=None):
        self.fault, self.calls = fault, []

    def create_repo(self, name, **options):
        self._called("create_repo")
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, folder_path, run_as_future, **options):
        if run_as_future:  # of a checkpoint, on the way: in a thread, whose faults nobody hears of
            (failed := Future()).set_exception(OSError("no network"))
            return failed
        self._called("upload_folder")
        LRRecord.load(folder_path)  # all of the run is there

    def _called(self, name):
        self.calls.append(name)
        if name == self.fault:
            raise httpx.ConnectError("[Errno -2] Name or service\nnot known")


@pytest.fixture
def made_up_hub(monkeypatch):
    def make(fault=None):
        made = Hub(fault)
        monkeypatch.setattr(trainer, "hf_api", lambda: made)
        return made

    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    return make


@pytest.mark.parametrize("flags", [["--push_to_hub"], ["--log_completions", "--log_completions_hub_repo", "me/them"]])
def test_the_hub_is_not_asked_for_where_it_cannot_be_had(flags, tmp_path, monkeypatch):
    for offline, message in ((False, "needs a token of the hub"), (True, "HF_HUB_OFFLINE is set")):
        monkeypatch.setattr(hub, "is_offline_mode", lambda offline=offline: offline)
        monkeypatch.setattr(hub, "get_token", lambda: None)
        with pytest.raises(UserError, match=message):
            run(*flags, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "instead"),
    [
        (["--hub_token", "hf_secret"], "set HF_TOKEN"),  # the run folder is what is pushed
        (["--resume_from_checkpoint", "runs/x/checkpoint-50"], "--resume RUN"),
        (["--eval_on_start"], "measured before the first step"),
        (["--accelerator_config", '{"dispatch_batches": true}'], "rows are text"),
    ],
)
def test_an_option_that_would_do_harm_or_nothing_is_refused_by_name(flags, instead):
    with pytest.raises(UserError, match=f"^{flags[0]} .*{instead}"):
        parse(flags)


def test_a_hub_out_of_reach_is_one_line_before_the_first_step(made_up_hub, tmp_path, capsys):
    made_up_hub("create_repo")
    with pytest.raises(SystemExit) as end:
        run_command(lambda: run("--push_to_hub", "--output_dir", tmp_path / "run"))
    assert "the hub cannot be used ([Errno -2] Name or service not known)" in capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_has_ended_is_pushed_once_and_whole(made_up_hub, tmp_path):
    calls = made_up_hub().calls
    run("--push_to_hub", "--output_dir", tmp_path / "run")
    assert calls == ["create_repo", "upload_folder"]


@pytest.mark.slow
def test_a_push_that_fails_takes_nothing_with_it_and_says_how_to_push_by_hand(made_up_hub, tmp_path):
    made_up_hub("upload_folder")
    folder = tmp_path / "run"
    with pytest.raises(UserError) as error:
        run("--push_to_hub", "--hub_revision", "v1", "--output_dir", folder)
    assert "service not known" in str(error.value)
    assert f"hf upload me/run {folder} . --exclude 'checkpoint-*' --revision v1" in str(error.value)
    assert LRRecord.load(folder).rank == 4
    assert RunFolder(folder).result().steps == 2
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert (folder / "curve.png").exists()


@pytest.fixture
def made_up_wandb(monkeypatch):
    """Weights & Biases as far as transformers uses it; `asked` has the ids under which runs began."""
    made, util = ModuleType("wandb"), ModuleType("wandb.sdk.lib.config_util")
    made.__spec__ = ModuleSpec("wandb", None)
    made.run, made.asked, made.Error = None, [], type("Error", (Exception,), {})
    made.config = type("Config", (dict,), {"update": lambda *given, **options: None})()
    made.log = made.define_metric = lambda *given, **options: None
    util.ConfigError = made.Error

    def init(project, name, id, resume):
        made.asked.append((project, name, id, resume))
        made.run = SimpleNamespace(id=id or "fresh", url="", summary={}, _label=lambda **options: None)
        return made.run

    made.init = init
    monkeypatch.setitem(sys.modules, "wandb", made)
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", util)
    for module in (profiling, base_trainer, grpo_trainer):  # which import it where it is installed
        monkeypatch.setattr(module, "wandb", made, raising=False)
    return made


@pytest.mark.slow
def test_a_resumed_run_goes_on_at_weights_and_biases(made_up_wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "sums")
    folder = run("--report_to", "wandb", "--save_steps", 1, "--output_dir", tmp_path / "run").path
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoint-2")
    made_up_wandb.run = None  # as in a new process
    grpo.train(*parse(["--resume", str(folder)]))
    assert made_up_wandb.asked == [("sums", "run", None, "allow"), ("sums", "run", "fresh", "allow")]


def test_weights_and_biases_that_says_no_is_one_line_before_the_first_step(made_up_wandb, tmp_path):
    def refuse(**options):
        raise made_up_wandb.Error("No API key\nconfigured.")

    made_up_wandb.init = refuse
    with pytest.raises(UserError, match=r"Weights & Biases cannot be used \(No API key configured\.\)"):
        run("--report_to", "wandb", "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("service", ["mlflow", "neptune"])
def test_a_service_whose_package_is_missing_is_one_line_and_nothing_of_its_own(service, tmp_path):
    command = [sys.executable, "-m", "mua_rl.grpo", "--report_to", service, "--output_dir", str(tmp_path / "r")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        f"mua_rl: error: --report_to {service} needs a package that is not installed: install it, or drop the word.\n"
    )
    assert not (tmp_path / "r").exists()
