"""A `vllm serve` on this machine that a LoRA run exchanges its adapter with."""

import sys
from pathlib import Path
from typing import Any

import requests
import torch
from trl.generation.vllm_client import VLLMClient

from mua_rl.errors import UserError, one_line
from mua_rl.rollouts.lora_engine import AdapterFolders, engine_rank


class AdapterServer(VLLMClient):
    """A `vllm serve` on this machine that reads A and B from the memory file system.

    A server that was restarted is waited for, for as long as a first one is, and given the adapter again.

    Args:
        url: Where it answers.
        rank: The largest rank of the policy's LoRA.
        patience: Seconds to wait for it.

    Raises:
        UserError: It does not answer, or was started without LoRA of this rank.
    """

    LOAD_SECONDS = 120
    START = (
        "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora "
        "--max-lora-rank {rank} --logprobs-mode processed_logprobs --max-logprobs -1"
    )

    def __init__(self, url: str, rank: int, patience: float) -> None:
        self.start = self.START.format(rank=engine_rank(rank))
        try:
            super().__init__(base_url=url, connection_timeout=patience)
        except requests.exceptions.ConnectionError as error:
            raise UserError(f"{error} For a LoRA run: {self.start}") from None
        lora: dict[str, Any] = self.get_server_info().get("lora_config") or {"max_lora_rank": 0}
        most = int(lora["max_lora_rank"])
        if most < rank:
            raise UserError(f"the vLLM server at {url} takes LoRA up to rank {most}: start it as {self.start}")
        self.lora_dtype = getattr(torch, str(lora["lora_dtype"]).removeprefix("torch."))
        self.patience = patience
        self.folders = AdapterFolders()
        self.adapter: Path | None = None

    def exchange(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Load an adapter under a new name, ask for it from now on, and drop the one before."""
        folder = self.folders.publish(name, tensors)
        try:
            self._load(folder)
        except requests.exceptions.ConnectionError:
            self._wait()
            self._load(folder)
        before, self.adapter, self.model = self.adapter, folder, name
        if before is not None:
            self.session.post(f"{self.base_url}/v1/unload_lora_adapter", json={"lora_name": before.name})
            self.folders.drop(before)
        self.reset_prefix_cache()

    def generate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Generate as TRL's client does, once more where a server was restarted meanwhile and has lost the adapter."""
        try:
            return super().generate(*args, **kwargs)
        except Exception:
            self._wait()
            if self.adapter is None or self.model in self._served():
                raise
            self._load(self.adapter)
            return super().generate(*args, **kwargs)

    def _wait(self) -> None:
        print(f"mua_rl: the vLLM server at {self.base_url} does not answer; waiting for it", file=sys.stderr)
        self.check_server(self.patience)

    def _served(self) -> list[str]:
        return [model["id"] for model in self._get(f"{self.base_url}/v1/models")["data"]]

    def _load(self, folder: Path) -> None:
        loading = {"lora_name": folder.name, "lora_path": str(folder)}
        # Not by the session, which would repeat a refusal for half a minute.
        answer = requests.post(f"{self.base_url}/v1/load_lora_adapter", json=loading, timeout=self.LOAD_SECONDS)
        if answer.status_code != 200:
            reason = one_line(answer.text, 200)
            raise UserError(f"the vLLM server did not take the adapter ({reason}): start it as {self.start}")
