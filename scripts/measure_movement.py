"""How far one to eight steps move SmolLM2 under each scheme and rank, per learning rate (issue 6).

    python scripts/measure_movement.py --output docs/results/movement_smollm2.csv     # about two minutes on an H100
    python scripts/measure_movement.py --model embedded --ranks 4 16 --output runs/movement.csv

One line of the CSV is one configuration at one learning rate after one number of steps. The learning rates of each
configuration lie around those at which its curve begins in scripts/reproduce_grpo.py.
"""

import argparse
import csv
from pathlib import Path

import torch
from reproduce_grpo import CENTRES, FFT_CENTRE

from mua_rl import models
from mua_rl.envs.tasks import get_task
from mua_rl.errors import Diverged
from mua_rl.movement import movement, probe_batch
from mua_rl.sweep.arm import Arm

STEPS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--octaves", type=int, nargs="+", default=[-4, -3, -2, -1, 0], help="from each curve's centre")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = models.load_model(options.model).to(device)
    batch = probe_batch(model, models.load_tokenizer(options.model), get_task(options.task))
    curves = [(r, *scheme, ranks[r]) for scheme, ranks in CENTRES.items() for r in options.ranks if r in ranks]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with open(options.output, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["task", "base", "rank", "init", "alpha", "log2_lr", "seed", "steps", "kl", "machine"])
        machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        for rank, init, alpha, centre in [*curves, (None, "", "", FFT_CENTRE)]:
            for log2_lr in (centre + k for k in options.octaves):
                for seed in options.seeds:
                    arm = Arm(rank, init, alpha, float(log2_lr), seed)
                    try:
                        kl = movement(model, arm.adapter("mlp"), arm.learning_rate, batch, max(STEPS), seed)
                    except Diverged as error:
                        print(f"{arm}: {error}")
                        continue
                    for steps in STEPS:
                        cells = [options.task, options.model, rank or "", init, alpha, arm.log2_lr, seed, steps]
                        writer.writerow([*cells, f"{kl[steps - 1]:.6g}", machine])
                    stream.flush()
            print(f"{rank or 'full'} {init} {alpha}: done", flush=True)


if __name__ == "__main__":
    main()
