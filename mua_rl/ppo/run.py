"""One PPO run from arguments to record."""

import time
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from stable_baselines3.common.vec_env import VecEnv

from mua_rl.errors import Diverged, UserError
from mua_rl.lr.record import LRRecord, package_versions
from mua_rl.lr.transfer import gives_full_finetuning
from mua_rl.ppo.arguments import PPOAdapterArguments, PPOArguments, complete
from mua_rl.ppo.checkpoint import Checkpoints, load_checkpoint
from mua_rl.ppo.envs import evaluation_envs
from mua_rl.ppo.evaluation import Returns, evaluate
from mua_rl.ppo.logs import RETURN, make_logger
from mua_rl.ppo.setup import POLICY, Setup, bare_envs, set_up
from mua_rl.ppo.trainer import PPO
from mua_rl.run import plots
from mua_rl.run.arguments import AdapterArguments, parse_run
from mua_rl.run.commands import from_policy, full_finetuning, other_ranks
from mua_rl.run.folder import ADAPTER_FOLDER, CURVE, RunFolder, open_run, start_wandb
from mua_rl.run.trial import is_clear

STATISTICS = "vecnormalize.pkl"
HELD_OUT = "held_out/return"


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
    task = arguments.env_id.rpartition(":")[2]
    name = f"ppo-{task}-r{adapter_arguments.rank or 'full'}"
    rate = {**setup.rate.as_dict(), "head": model.head_learning_rate}
    run, checkpoint = open_run(adapter_arguments.resume, arguments.output_dir, name, given, rate)
    console = Console()
    trained = sum(p.numel() for p in model.learner.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.policy.parameters())
    layers = ", ".join(model.target_layers)
    console.print(
        f"[bold]{arguments.env_id}[/] from {setup.base.name} ({total:,} weights), {setup.configuration}, {trained:,} "
        f"trained{f': LoRA on {layers}, and the heads' if model.attached.rank else ''}\n"
        f"learning rate [bold]{setup.rate.value:.4g}[/]: {setup.rate.reason}\nrun folder {run.path}",
        highlight=False,
        soft_wrap=True,
    )
    if setup.rate.warning:
        console.print(f"[yellow]{setup.rate.warning}[/]", highlight=False, soft_wrap=True)
    if setup.pretrained is None and model.attached.rank:
        console.print(
            "[yellow]There is no pretrained policy here, and LoRA keeps random weights: --rank full learns more.[/]"
        )
    training = model.get_env()
    assert training is not None
    held_out = evaluation_envs(bare_envs(arguments, min(8, arguments.eval_episodes), 0), training)
    before = _before(run, model, held_out, arguments.eval_episodes)
    if arguments.wandb:
        start_wandb(run, project="mua_rl", dir=str(run.path), config=given, sync_tensorboard=True)
    model.set_logger(make_logger(run, _tensorboard(arguments, run), arguments.verbose))
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    start = time.perf_counter()
    first_step = model.num_timesteps
    try:
        model.learn(
            arguments.total_timesteps - model.num_timesteps,
            callback=Checkpoints(run.path, arguments.checkpoint_steps or max(1, arguments.total_timesteps // 5)),
            reset_num_timesteps=checkpoint is None,
            progress_bar=arguments.progress_bar and console.is_terminal,
        )
    except Diverged as error:
        run.finish({"diverged": True, "reason": str(error), "before": before, "learning_rate": setup.rate.value})
        raise
    seconds = time.perf_counter() - start
    after = evaluate(model, held_out, arguments.eval_episodes)
    worse = is_clear(before["mean"] - after.mean, after.standard_error)
    _save(run, model)
    run.log(model.num_timesteps, {HELD_OUT: after.mean, "held_out/iqm": after.iqm})
    plots.learning_curve(
        run.metrics(),
        run.path / CURVE,
        f"{arguments.env_id}, {setup.configuration}, lr {setup.rate.value:.3g}",
        {RETURN: "training return", HELD_OUT: "held-out return"},
        "environment step",
    )
    if not worse:
        metric = {"name": "held-out return", "before": before["mean"], "after": after.mean}
        lr_record(arguments, setup, metric).save(run.path)
    run.finish(
        {
            "diverged": worse,
            "held_out/before": before,
            "held_out/after": after.as_dict(),
            "learning_rate": setup.rate.value,
            "reason": setup.rate.reason,
            "seconds": seconds,
            "env_steps": model.num_timesteps,
            "env_steps_per_second": (model.num_timesteps - first_step) / seconds,
        }
    )
    _report(console, run, before, after, setup, seconds, worse)
    return run


def lr_record(arguments: PPOArguments, setup: Setup, metric: dict) -> LRRecord:
    """The record of a run that has ended."""
    model, configuration = setup.model, setup.configuration
    group = model.learner.optimizer.param_groups[0]
    return LRRecord(
        learning_rate=setup.rate.value,
        scheme=configuration.scheme.value,
        rank=configuration.rank,
        alpha=str(configuration.alpha),
        widths=model.widths,
        target_modules=model.target_layers,
        algorithm="ppo",
        task=arguments.env_id,
        base_model=setup.base.name,
        base_fingerprint=setup.base.fingerprint,
        optimizer={
            "name": configuration.optimizer,
            **{key: group[key] for key in ("betas", "eps", "weight_decay") if key in group},
            "max_grad_norm": model.max_grad_norm,
        },
        schedule={"name": arguments.lr_schedule, "final_fraction": 0.1, "env_steps": arguments.total_timesteps},
        batch={
            "environments": model.n_envs,
            "steps_per_rollout": model.n_steps,
            "minibatch": model.batch_size,
            "epochs": model.n_epochs,
            "target_kl": model.target_kl,
        },
        metric=metric,
        seeds=[arguments.seed],
        versions=package_versions(),
        other_learning_rates={"head": model.head_learning_rate or setup.rate.value},
        outputs=configuration.outputs,
        note=setup.rate.reason,
    )


def _tensorboard(arguments: PPOArguments, run: RunFolder) -> Path | None:
    if arguments.tensorboard_log == "none":
        return None
    return Path(arguments.tensorboard_log) if arguments.tensorboard_log else run.path / "tensorboard"


def _before(run: RunFolder, model: PPO, envs: VecEnv, episodes: int) -> dict[str, float]:
    """Held-out return before the first step; measured once, also where a run is resumed."""
    for line in run.metrics():
        if line["step"] == 0 and HELD_OUT in line:
            return line["before"]
    before = evaluate(model, envs, episodes)
    run.log(0, {HELD_OUT: before.mean, "before": before.as_dict()})
    return before.as_dict()


def _save(run: RunFolder, model: PPO) -> None:
    """The merged policy for plain SB3, the statistics that belong to it, and the adapter for plain PEFT."""
    model.save(run.path / POLICY)
    if (statistics := model.get_vec_normalize_env()) is not None:
        statistics.save(str(run.path / STATISTICS))
    model.save_adapter(run.path / ADAPTER_FOLDER)


def _report(
    console: Console, run: RunFolder, before: dict, after: Returns, setup: Setup, seconds: float, worse: bool
) -> None:
    """The closing table and what to do next."""
    steps = setup.model.num_timesteps
    rows = Table("", Column("", overflow="fold"), show_header=False, title="result", title_justify="left")
    rows.add_row("held-out return before", f"{before['mean']:.1f} ± {before['std']:.1f} (IQM {before['iqm']:.1f})")
    rows.add_row("held-out return after", f"{after.mean:.1f} ± {after.std:.1f} (IQM {after.iqm:.1f})", style="bold")
    rows.add_row("mean ± standard deviation over", f"{len(after.values)} episodes on seeds not trained on")
    rows.add_row("learning rate", f"{setup.rate.value:.4g}")
    rows.add_row("training time", f"{seconds:.0f} s, {steps:,} environment steps")
    rows.add_row("run folder", str(run.path))
    console.print(rows)
    if worse:
        normalised = setup.model.get_vec_normalize_env() is not None
        moved = ", or the observation statistics have moved away from what the base policy knew" if normalised else ""
        console.print(
            f"[bold red]The policy got worse[/]: this learning rate is too large{moved}, and no LR record was written. "
            "Try a quarter of it with --lr."
        )
        return
    settings = run.settings()
    onward = (
        f"\nfull finetuning at this rate: {full_finetuning('ppo', settings, run.path)}"
        f"\n… from this policy: {from_policy('ppo', settings, run.path)}"
    )
    console.print(
        f"learning curve: {run.path / CURVE}\n"
        f"the policy for stable_baselines3.PPO.load: {run.path / POLICY}\n"
        f"the learning rate at other ranks: {other_ranks(run.path)}"
        f"{onward if gives_full_finetuning(LRRecord.load(run.path)) else ''}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def parse(argv: list[str] | None = None) -> tuple[PPOArguments, AdapterArguments, dict]:
    """Command line to arguments.

    Raises:
        UserError: As `parse_run`; or `--start_from` contradicts `--base`.
    """
    adapter_arguments, arguments, given = parse_run(PPOAdapterArguments, PPOArguments, argv)
    complete(arguments, adapter_arguments, given)
    return arguments, adapter_arguments, given
