"""One PPO run from arguments to record."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from stable_baselines3.common.callbacks import BaseCallback

from mua_rl.errors import Unscored, UserError
from mua_rl.lr.recipe import Recipe
from mua_rl.ppo.arguments import PPOArguments
from mua_rl.ppo.checkpoint import Checkpoints, load_checkpoint
from mua_rl.ppo.envs import evaluation_envs
from mua_rl.ppo.evaluation import Returns, evaluate
from mua_rl.ppo.layers import CRITIC, HEAD
from mua_rl.ppo.logs import RETURN, OwnReturns, make_logger
from mua_rl.ppo.on_the_way import BEST, Evaluations, best_before
from mua_rl.ppo.setup import POLICY, PPOSetup, bare_envs, batch, set_up
from mua_rl.run.arguments import AdapterArguments
from mua_rl.run.folder import ADAPTER_FOLDER, RunFolder, open_run, start_wandb
from mua_rl.run.life import Measurement, Names, announce, live, say

STATISTICS = "vecnormalize.pkl"


NAMES = Names("ppo", "held-out return", "held_out/return", "training return", RETURN, "environment step")


class PPOLearner:
    """A PPO run as `mua_rl.run.life` sees it.

    Args:
        setup: The model and what it starts from.
        arguments: What was asked.
        run: The run's folder.
    """

    names = NAMES

    def __init__(self, setup: PPOSetup, arguments: PPOArguments, run: RunFolder) -> None:
        self.setup, self.arguments, self.run = setup, arguments, run
        self.model, self.recipe, self.spec = setup.model, recipe_of(arguments, setup), setup.configuration.spec
        self.rate, self.seed = setup.rate, arguments.seed
        training = self.model.get_env()
        assert training is not None
        self.held_out = evaluation_envs(bare_envs(arguments, min(8, arguments.eval_episodes), 0), training)

    @property
    def title(self) -> str:
        """See `Learner.title`."""
        return f"{self.arguments.env_id}, {self.setup.configuration}, lr {self.rate.value:.3g}"

    @property
    def steps(self) -> int:
        """See `Learner.steps`."""
        return self.model.num_timesteps

    def train(self, checkpoint: Path | None, on_begin: Callable[[], None]) -> None:
        """See `Learner.train`."""
        arguments, total = self.arguments, self.arguments.total_timesteps
        on_begin()
        if arguments.wandb:
            start_wandb(
                self.run, project="mua_rl", dir=str(self.run.path), config=self.run.settings(), sync_tensorboard=True
            )
        self.model.set_logger(make_logger(self.run, _tensorboard(arguments, self.run), arguments.verbose))
        if checkpoint is not None:
            load_checkpoint(self.model, checkpoint)
        own_returns = OwnReturns()
        every = arguments.checkpoint_steps or max(1, total // 5)
        callbacks: list[BaseCallback] = [own_returns, Checkpoints(self.run.path, every, on_restart=own_returns.restart)]
        if arguments.eval_steps is not None:
            callbacks.append(Evaluations(self.run, arguments.eval_steps, self.returns, NAMES.score_key))
        self.model.learn(
            total - self.model.num_timesteps,
            callback=callbacks,
            reset_num_timesteps=checkpoint is None,
            progress_bar=arguments.progress_bar and Console().is_terminal,
        )

    def returns(self) -> Returns:
        """Held-out returns of the policy as it is now."""
        return evaluate(self.model, self.held_out, self.arguments.eval_episodes)

    def measure(self) -> Measurement:
        """See `Learner.measure`."""
        returns = self.returns()
        metrics = {"held_out/iqm": returns.iqm}
        return Measurement(returns.mean, returns.standard_error, str(returns), metrics, returns.values)

    def save(self, run: RunFolder) -> None:
        """Write the merged policy for plain SB3, the statistics that belong to it, and the adapter for plain PEFT."""
        self.model.save(run.path / POLICY)
        if (statistics := self.model.get_vec_normalize_env()) is not None:
            statistics.save(str(run.path / STATISTICS))
        self.model.save_adapter(run.path / ADAPTER_FOLDER)

    def unscored(self, metrics: list[dict[str, Any]]) -> Unscored | None:
        """See `Learner.unscored`: no episode need end while a policy learns."""
        return None

    def remarks(self) -> list[str]:
        """See `Learner.remarks`."""
        lines = [f"the policy for stable_baselines3.PPO.load: {self.run.path / POLICY}"]
        if (self.run.path / BEST).exists() and (best := best_before(self.run, NAMES.score_key, self.steps)):
            lines.append(f"the best on the way, {best[0]:.4g} after {best[1]:,} steps: {self.run.path / BEST}")
        return lines

    def doubt(self) -> str:
        """See `Learner.doubt`."""
        normalised = self.model.get_vec_normalize_env() is not None
        return "the observation statistics have moved away from what the base policy knew" if normalised else ""


def train(arguments: PPOArguments, adapter_arguments: AdapterArguments, given: dict) -> RunFolder:
    """One run from arguments to result: build, attach, train, evaluate, record.

    Raises:
        UserError: Something that was given cannot be used (nothing has been written then), or an environment gave a
            non-finite observation or reward.
        Diverged: A weight left the finite numbers; the run folder says so and has no LR record.
    """
    if arguments.wandb and find_spec("wandb") is None:
        raise UserError("--wandb needs Weights & Biases, which is not installed: pip install wandb, or drop the flag.")
    if arguments.wandb and arguments.tensorboard_log == "none":
        raise UserError("--wandb passes on what TensorBoard gets: drop --tensorboard_log none.")
    setup = set_up(arguments, adapter_arguments)
    model = setup.model
    name = f"ppo-{arguments.env_id.rpartition(':')[2]}-r{adapter_arguments.rank or 'full'}"
    others = {HEAD: model.head_learning_rate, CRITIC: model.critic_learning_rate}
    rate = {**setup.rate.as_dict(), **{role: value for role, value in others.items() if value is not None}}
    run, checkpoint = open_run(adapter_arguments.resume, arguments.output_dir, name, given, rate)
    _announce(arguments, setup, run)
    live(run, PPOLearner(setup, arguments, run), checkpoint)
    return run


def _announce(arguments: PPOArguments, setup: PPOSetup, run: RunFolder) -> None:
    """Say what the run is about to do."""
    model, is_lora = setup.model, bool(setup.model.attached.rank)
    trained = sum(p.numel() for p in model.learner.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.policy.parameters())
    whole = [n for n, p in model.learner.named_parameters() if p.requires_grad and "lora_" not in n]
    whole = list(dict.fromkeys(re.sub(r"(\.\d+)?\.(weight|bias)$", "", name) for name in whole))
    fully = f", all of {', '.join(whole)}" if whole else ""
    layers = f": LoRA on {', '.join(model.target_layers)}{fully}" if is_lora else ""
    what = f"[bold]{escape(arguments.env_id)}[/] from {escape(setup.base.name)} ({total:,} weights)"
    announce(run, f"{what}, {escape(str(setup.configuration))}, {trained:,} trained{layers}", setup.rate)
    for layer, rank in getattr(model.attached, "layer_ranks", {}).items():
        say(f"{escape(layer)} carries rank {rank}, the most that it can")
    if setup.pretrained is not None and setup.pretrained.vec_normalize is not None:
        say(f"observation statistics {escape(str(setup.pretrained.vec_normalize))}")
    if setup.pretrained is None and is_lora:
        say("[yellow]There is no pretrained policy here, and LoRA keeps random weights: --rank full learns more.[/]")


def recipe_of(arguments: PPOArguments, setup: PPOSetup) -> Recipe:
    """What the runs of these arguments have in common."""
    model = setup.model
    group = model.learner.optimizer.param_groups[0]
    return Recipe(
        algorithm=NAMES.algorithm,
        task=arguments.env_id,
        base_model=setup.base.name,
        base_fingerprint=setup.base.fingerprint,
        widths=model.widths,
        outputs=setup.configuration.outputs,
        target_modules=model.target_layers,
        optimizer={
            "name": setup.configuration.optimizer,
            **{key: group[key] for key in ("betas", "eps", "weight_decay") if key in group},
            "max_grad_norm": model.max_grad_norm,
        },
        schedule={"name": arguments.lr_schedule, "final_fraction": 0.1, "env_steps": arguments.total_timesteps},
        batch=batch(model),
        score=NAMES.score,
        other_learning_rates={
            HEAD: model.head_learning_rate,
            **({CRITIC: model.critic_learning_rate} if model.critic_learning_rate else {}),
        },
    )


def _tensorboard(arguments: PPOArguments, run: RunFolder) -> Path | None:
    if arguments.tensorboard_log == "none":
        return None
    return Path(arguments.tensorboard_log) if arguments.tensorboard_log else run.path / "tensorboard"
