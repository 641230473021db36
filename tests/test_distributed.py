"""GRPO in two processes (gloo): the same run as in one, with DDP, FSDP2 and, where DeepSpeed is installed, ZeRO-3."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import distributed_driver
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mua_rl.accelerate_configs import config_file, names
from mua_rl.errors import UserError
from mua_rl.lr.record import LRRecord
from mua_rl.run.folder import RunFolder
from mua_rl.run.trial import Status

pytestmark = pytest.mark.slow

DRIVER = distributed_driver.__file__
ZERO3 = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed")


def launch(layout, number, folder, *jobs):
    """`accelerate launch` with the package's configuration, on the CPU; its exit code and what it printed."""
    settings = {**yaml.safe_load(config_file(layout).read_text()), "use_cpu": True}
    (folder / f"{layout}.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / f"{layout}.yaml")]
    command += ["--num_processes", str(number), "--main_process_port", "0", DRIVER, str(folder), *jobs]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(DRIVER).parent),
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    return done.returncode, done.stdout + done.stderr


PASSES = ("passes-lora", "passes-fft")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("one")
    distributed_driver.jobs(folder, "lora", "fft", *PASSES)
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp2", pytest.param("zero3", marks=ZERO3)])
def two(request, tmp_path_factory):
    """The same in two processes, and a third one in which a process was killed; what the launcher printed."""
    folder = tmp_path_factory.mktemp(request.param)
    code, printed = launch(request.param, 2, folder, "lora", "fft", "killed")
    return request.param, folder, code, printed


def weights(folder):
    (path,) = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return load_file(path)


def assert_same_weights(first, second):
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    assert min(weight.abs().max() for weight in one.values()) > 1e-4  # A starts at zero: it has been trained
    for name in one:
        assert two[name].dtype == torch.float32
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("job", ["lora", "fft"])
def test_two_processes_make_the_run_of_one(one, two, job):
    _, folder, _, printed = two
    assert (folder / job / "result.json").exists(), printed
    assert_same_weights(one / job, folder / job)
    alone, together = RunFolder(one / job), RunFolder(folder / job)
    for before, after in zip(alone.metrics(), together.metrics(), strict=True):
        shared = {k: v for k, v in before.items() if "time" not in k and k not in ("loss", "before")}
        assert {k: after[k] for k in shared} == pytest.approx(shared, rel=1e-3, abs=1e-4)
        assert after.get("before") == before.get("before")  # the first measurement, as text
        if "loss" in before:
            assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
    assert [line["step"] for line in together.metrics()] == [0, 1, 2, 3, 3, 4, 5, 5]
    records = [replace(LRRecord.load(run.path), created="") for run in (alone, together)]
    assert records[0] == records[1]
    assert {p.name for p in alone.path.iterdir()} == {p.name for p in together.path.iterdir()}
    assert json.loads((together.path / "versions.json").read_text())["processes"] == 2
    assert together.settings().keys() == alone.settings().keys()


def test_fsdp2_takes_steps_of_several_passes_with_an_output_layer_of_its_own(one, tmp_path):
    """TRL never calls that layer, which FSDP2 counts on: the first backward pass of several failed."""
    code, printed = launch("fsdp2", 2, tmp_path, *PASSES)
    assert code == 0, printed
    for job in PASSES:
        assert_same_weights(one / job, tmp_path / job)
        alone, together = RunFolder(one / job).metrics(), RunFolder(tmp_path / job).metrics()
        assert [line["step"] for line in together] == [1, 2, 3]
        for name in ("loss", "grad_norm", "reward"):
            expected = [line[name] for line in alone]
            assert [line[name] for line in together] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    pushed, base = (
        load_file(tmp_path / "passes-fft/pushed.safetensors"),
        load_file(tmp_path / "untied/model.safetensors"),
    )
    assert pushed.keys() == base.keys()
    assert all((pushed[name] == base[name]).all() for name in base)


def test_an_engine_is_given_all_weights_as_they_are_after_a_measurement(two):
    """accelerate's FSDP2 leaves the last layers whole after a forward pass, and TRL knows sharded weights alone."""
    run = two[1] / "fft"
    pushed, saved = load_file(run / "pushed.safetensors"), weights(run)
    assert pushed.keys() == saved.keys()
    for name in saved:
        torch.testing.assert_close(pushed[name], saved[name], rtol=0, atol=0)


def test_only_the_main_process_speaks(two):
    printed = two[3]
    assert printed.count("held-out accuracy after") == 2  # the runs that ended
    assert printed.count("run folder") >= 2
    assert len(re.findall("learning rate .*given by --lr", printed)) == 3


def test_a_killed_process_ends_the_job_and_another_number_resumes(one, two):
    layout, folder, code, printed = two
    assert code != 0
    assert re.search(r"Signal 9 \(SIGKILL\)|exitcode\s*: -9", printed)
    run = RunFolder(folder / "killed")
    assert run.result() is None
    assert run.last_checkpoint().name == f"checkpoint-{distributed_driver.SAVED}"
    if layout == "ddp":
        distributed_driver.jobs(folder, "resume:killed")
    else:
        # DeepSpeed's checkpoints are for as many processes as wrote them.
        name, number = {"fsdp2": ("FSDP2", 1), "zero3": ("ZeRO-3", 2)}[layout]
        with pytest.raises(UserError, match=rf"written under {name}.*accelerate launch"):
            distributed_driver.jobs(folder, "resume:killed")
        if layout == "zero3":
            code, printed = launch(layout, 1, folder, "resume:killed")
            assert code != 0
            assert "mua_rl: error" in printed
            assert "--num_processes 2" in printed
        code, printed = launch(layout, number, folder, "resume:killed")
        assert code == 0, printed
    assert_same_weights(one / "lora", run.path)
    assert [line["step"] for line in run.metrics() if "loss" in line] == list(range(1, distributed_driver.STEPS + 1))


@pytest.mark.parametrize("layout", ["ddp", pytest.param("zero3", marks=ZERO3)])
def test_divergence_in_one_process_ends_all_with_one_message(layout, tmp_path):
    code, printed = launch(layout, 2, tmp_path, "diverged")
    assert code != 0
    assert printed.count("the run diverged: the gradient was not finite in 3 steps in a row, up to step 3") == 1
    assert re.search(r"exitcode\s*: 3 ", printed)
    assert RunFolder(tmp_path / "diverged").result().status is Status.DIVERGED
    assert not (tmp_path / "diverged" / "lr_record.json").exists()


def test_configurations_have_names():
    assert names() == ["ddp", "fsdp2", "zero3"]
    with pytest.raises(UserError, match="choose one of ddp, fsdp2, zero3"):
        config_file("ddp4")
