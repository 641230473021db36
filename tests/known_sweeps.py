"""Rows of finished sweeps whose optima are known."""

import math

import numpy as np
from helpers import spec

from mua_rl.analysis.measured import FFT, Context, sweeps_of
from mua_rl.analysis.rows import SweepRow
from mua_rl.run.trial import Status, Trial, TrialResult

SIZES = Context(width=512, outputs=256)
FFT_OPTIMUM = -12.3
SCHEMES = (("B", "1"), ("A", "1"), ("A", "1/r"))


def outcome(metric=0.5, *, before=0.1, stopped="", steps=60, seconds=10.0):
    status = Status.STOPPED if stopped else Status.OK
    return TrialResult(metric, 0.01, before, metric, metric, status, stopped, steps, seconds)


def row(trial, result, *, task="arithmetic", base="base", algorithm="grpo"):
    return SweepRow(algorithm, task, base, trial, result, "a machine")


def optimum_of(curve, exponent):
    """log2 η*: Init[B] moves by (r/m)^-exponent from FFT's, Init[A] as the theory says."""
    if curve.rank is None:
        return FFT_OPTIMUM
    if curve.init == "B":
        return FFT_OPTIMUM - exponent * math.log2(curve.rank / SIZES.outputs)
    return -6.0 if str(curve.alpha) == "1/r" else -6.0 - 0.5 * math.log2(curve.rank)


def sweep_rows(ranks=(4, 16, 64), schemes=SCHEMES, *, exponent=0.25, fft=True, seeds=2, noise=0.01, **where):
    """Hills with one scale and a cliff three octaves past the top."""
    rng = np.random.default_rng(len(where.get("task", "")))
    rows = []
    for curve in [spec(rank, *scheme) for scheme in schemes for rank in ranks] + [FFT] * fft:
        best = optimum_of(curve, exponent)
        for log2_lr in np.arange(math.floor(best) - 4, math.floor(best) + 5, 0.5):
            for seed in range(seeds):
                height = 0.8 * math.exp(-(((log2_lr - best) / 2.2) ** 2))
                result = outcome(float(0.1 + height + rng.normal(0, noise)), seconds=10.0 if curve.rank else 40.0)
                if log2_lr > best + 3:
                    result = TrialResult.of_divergence(0.1, 20, 3.0, "not finite")
                rows.append(row(Trial(curve, float(log2_lr), seed), result, **where))
    return rows


def sweeps(rows, context=SIZES):
    return sweeps_of(rows, contexts=lambda key: context)
