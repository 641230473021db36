"""What several test files need."""

from mua_rl.lr.record import LRRecord
from mua_rl.lr.spec import AdapterSpec, AlphaRule, Scheme
from mua_rl.run.trial import Trial


def spec(rank, init="B", alpha="1") -> AdapterSpec:
    """What a trial trains, as people write it."""
    return AdapterSpec.parse(rank, init, alpha)


def scheme(init="B", alpha="1") -> tuple[Scheme, AlphaRule]:
    """A scheme and a multiplier, as people write them."""
    return spec(1, init, alpha).scheme, AlphaRule.parse(alpha)


def make_trial(rank, init="B", alpha="1", log2_lr=-10.0, seed=0) -> Trial:
    """A trial, as people write it."""
    return Trial(spec(rank, init, alpha), log2_lr, seed)


def make_record(**changes) -> LRRecord:
    """A complete record, with some entries changed."""
    entries = {
        "learning_rate": 2**-10,
        "scheme": "Init[B]",
        "rank": 8,
        "alpha": "1",
        "widths": [128, 512],
        "target_modules": "mlp",
        "algorithm": "grpo",
        "task": "arithmetic",
        "base_model": "embedded",
        "base_fingerprint": "0" * 16,
        "optimizer": {"name": "adamw_torch", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
        "schedule": {"name": "cosine_with_min_lr", "warmup": 0.05, "steps": 100},
        "batch": {"prompts": 32, "completions_per_prompt": 8},
        "metric": {"name": "held-out accuracy", "before": 0.3, "after": 0.9},
        "seeds": [0],
        "versions": {"python": "3.11"},
        "evidence": "sweep",
    }
    return LRRecord(**{**entries, **changes})
