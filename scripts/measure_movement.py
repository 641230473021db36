"""How far a few steps move SmolLM2 under each scheme and rank, per learning rate (issue 6).

    python scripts/measure_movement.py --output docs/results/movement_grpo.csv        # on a GPU
    python scripts/measure_movement.py --model embedded --only rank=4,full --output runs/movement.csv

One line of the CSV is one configuration at one learning rate after one number of steps. The learning rates of each
configuration lie around those at which its curve begins in scripts/reproduce_grpo.py.
"""

import argparse
import csv
from pathlib import Path

import torch
from reproduce_grpo import searches, wanted

from mua_rl.adapter.adapters import adapter_for
from mua_rl.envs.tasks import get_task
from mua_rl.errors import Diverged
from mua_rl.lm import models
from mua_rl.probes.movement import movement, probe_batch
from mua_rl.run.machine import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME=VALUE", help="of rank, init and alpha")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--octaves", type=int, nargs="+", default=[-4, -3, -2, -1, 0], help="from each curve's centre")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = models.load_model(options.model).to(device)
    batch = probe_batch(model, models.load_tokenizer(options.model), get_task(options.task), options.prompts)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with open(options.output, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["task", "base", "rank", "init", "alpha", "log2_lr", "seed", "steps", "kl", "machine"])
        for search in searches(options.seeds, 1.0):
            if not wanted(search, options.only):
                continue
            centre = search.scan[len(search.scan) // 2]
            for trial in (search.trial(centre + k, seed) for k in options.octaves for seed in options.seeds):
                try:
                    adapter = adapter_for(trial.spec, "mlp")
                    kl = movement(model, adapter, trial.learning_rate, batch, max(options.steps), trial.seed)
                except Diverged as error:
                    print(f"{trial}: {error}")
                    continue
                for steps in options.steps:
                    cells = [options.task, options.model, *("" if v is None else v for v in trial.as_dict().values())]
                    writer.writerow([*cells, steps, f"{kl[steps - 1]:.6g}", machine(device)])
                stream.flush()
                print(f"{trial}: {kl}", flush=True)


if __name__ == "__main__":
    main()
