"""The commands that are printed at a run's end: parsed again, they are accepted and mean what they say."""

import re
import shlex
from dataclasses import asdict, fields

import pytest

from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.errors import UserError
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse as parse_grpo
from mua_rl.grpo.setup import prepare_grpo
from mua_rl.lr.record import LRRecord
from mua_rl.run import commands
from mua_rl.run.folder import RunFolder

ppo = pytest.importorskip("mua_rl.ppo.run")
ppo_arguments = pytest.importorskip("mua_rl.ppo.arguments")
ppo_base = pytest.importorskip("mua_rl.ppo.base")

GRPO = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--report_to", "none"]
GRPO += ["--held_out_steps", "0", "--max_steps", "1", "--held_out_problems", "8", "--lr", "1e-6"]
PPO = ["--total_timesteps", "512", "--eval_episodes", "4", "--tensorboard_log", "none", "--progress_bar", "false"]
PPO += ["--n_steps", "128", "--n_envs", "2", "--batch_size", "64"]


def printed(text, module):
    """The flags of the commands in a text, each as a shell would split them."""
    lines = re.findall(rf"python -m {module} (.*)", text)
    return [shlex.split(line) for line in lines]


def meant(parsed, *but):
    """What a parsed command line asks the trainer for."""
    return {f.name: getattr(parsed[0], f.name) for f in fields(parsed[0]) if f.name not in but}


ODD_GRPO = """--target_modules '(.*[kq]_proj|up)' --max_steps=-1 --save_steps 0.5 --bad_rows refuse
    --report_to tensorboard none --mask_truncated_completions false --lr_scheduler_kwargs '{"min_lr_rate": 0.2}'
    --model_init_kwargs '{"attn_implementation": "eager"}' --model '/my models/"x"'"""
ODD_PPO = """--env_kwargs '{"gravity": 12}' --subprocesses true --target_modules policy_net.2 'a b'
    --normalize_advantage false --base "/my policies/it's.zip" --clip_range 1e-05"""


@pytest.mark.parametrize(
    ("parse", "module", "flags"),
    [(parse_grpo, "grpo", ODD_GRPO), (ppo_arguments.parse, "ppo", ODD_PPO)],
    ids=["grpo", "ppo"],
)
def test_a_command_says_all_that_was_given_in_any_form(parse, module, flags):
    first = parse(shlex.split(flags))
    words = shlex.split(commands.command(module, first[2]))
    assert words[:3] == ["python", "-m", f"mua_rl.{module}"]
    again = parse(words[3:])
    assert meant(again) == meant(first)
    assert asdict(again[1]) == asdict(first[1]) and again[2] == first[2]


def test_what_a_yaml_file_gave_is_said_by_flags():
    words = shlex.split(commands.command("ppo", {"env_kwargs": {"g": [1]}, "wandb": True, "frame_stack": 2}))
    arguments = ppo_arguments.parse(words[3:])[0]
    assert (arguments.env_kwargs, arguments.wandb, arguments.frame_stack) == ({"g": [1]}, True, 2)


@pytest.mark.slow
def test_after_a_ppo_run_in_an_environment_of_ones_own_both_commands_train_in_it(tmp_path, capsys):
    own = ["--env_id", "Pendulum-v1", "--env_kwargs", '{"g": 9.0}', "--base", "none", "--vec_normalize", "new"]
    own += ["--policy_kwargs", '{"net_arch": [16, 16]}', "--seed", "3", "--rank", "4", "--lr", "1e-6"]
    folder = tmp_path / "a run"
    first = ppo_arguments.parse([*PPO, *own, "--output_dir", str(folder)])
    ppo.train(*first)
    full, onward = printed(capsys.readouterr().out, "mua_rl.ppo")
    again = ppo_arguments.parse(full)
    assert meant(again, "learning_rate", "output_dir") == meant(first, "learning_rate", "output_dir")
    setup, record = ppo.set_up(*again[:2]), LRRecord.load(folder)
    assert setup.configuration.rank is None and setup.base.fingerprint == record.base_fingerprint
    later = ppo_arguments.parse(onward)
    new = ("learning_rate", "output_dir", "base", "vec_normalize", "policy_kwargs")
    assert meant(later, *new) == meant(first, *new)
    setup = ppo.set_up(*later[:2])
    assert setup.configuration.rank is None
    assert all((setup.model.policy.state_dict()[k] == v).all() for k, v in policy_of(folder).items())
    assert setup.model.get_vec_normalize_env() is not None


def policy_of(folder):
    return ppo_base.read_base_policy(folder / "policy.zip").state_dict


def earlier(folder, **settings):
    run = RunFolder.create(str(folder), "")
    run.start(settings)
    return str(run.path)


def test_a_ppo_run_that_starts_from_another_is_in_its_environment_unless_another_is_given(tmp_path):
    folder = earlier(tmp_path / "r", env_id="Pendulum-v1", env_kwargs='{"g": 9.0}', frame_stack=2)
    arguments, _, given = ppo_arguments.parse(["--start_from", folder])
    assert (arguments.env_id, arguments.env_kwargs, arguments.frame_stack) == ("Pendulum-v1", {"g": 9.0}, 2)
    assert given["env_id"] == "Pendulum-v1"  # so that the run folder says it
    arguments, _, _ = ppo_arguments.parse(["--start_from", folder, "--env_kwargs", '{"g": 5.0}'])
    assert (arguments.env_id, arguments.env_kwargs, arguments.frame_stack) == ("Pendulum-v1", {"g": 5.0}, 2)
    other, _, _ = ppo_arguments.parse(["--start_from", folder, "--env_id", ppo_default()])
    assert (other.env_id, other.env_kwargs, other.frame_stack) == (ppo_default(), None, 1)
    assert ppo_arguments.parse(["--start_from", earlier(tmp_path / "d")])[0].env_id == ppo_default()
    with pytest.raises(UserError, match="brings its own policy: drop --base"):
        ppo_arguments.parse(["--start_from", folder, "--base", "p.zip"])


def ppo_default():
    return ppo.PPOArguments().env_id


@pytest.mark.slow
def test_after_a_grpo_run_from_another_run_both_commands_start_where_they_say(tmp_path, capsys):
    targets = ["--target_modules", r".*\.[ud][po][w_].*proj"]  # of a regular expression nothing may get lost
    grpo.train(*parse_grpo([*GRPO, "--rank", "2", "--output_dir", str(tmp_path / "first")]))
    first = parse_grpo(
        [*GRPO, *targets, "--rank", "2", "--start_from", str(tmp_path / "first"), "--output_dir", str(tmp_path / "b c")]
    )
    capsys.readouterr()
    grpo.train(*first)
    full, onward = printed(capsys.readouterr().out, "mua_rl.grpo")
    again, later = parse_grpo(full), parse_grpo(onward)
    assert again[1].start_from == str(tmp_path / "first") and later[1].start_from == str(tmp_path / "b c")
    for parsed in (again, later):
        assert parsed[1].target_modules == targets[1:] and parsed[0].max_steps == 1
    record = LRRecord.load(tmp_path / "b c")
    setup = prepare_grpo(*again[:2])
    assert setup.adapter.rank is None and setup.base.fingerprint == record.base_fingerprint
    assert setup.widths == record.widths
    setup = prepare_grpo(*later[:2])
    assert setup.adapter.rank is None and setup.base.record == record
    assert setup.base.fingerprint == fingerprint(setup.policy) and setup.widths == record.widths
