"""Control tasks with a shift: Gymnasium tasks whose physics can be changed, for finetuning a pretrained policy.

Importing this module registers the tasks. In code that does not import it, name it in the id, as Gymnasium provides
for (since 1.0 it loads no entry points): `gymnasium.make("mua_rl.envs.control:mua_rl/CartPole-LongPole-v0")`; the same
string works in `gymnasium.make_vec`, stable-baselines3's `make_vec_env` and `python -m mua_rl.ppo --env_id`.

The nominal task of a family (`mua_rl/CartPole-v0`) has Gymnasium's own dynamics, rewards, spaces and time limit; a
shifted one differs in the physical parameters named here and in nothing else. Any other value is a keyword of `make`:
`gymnasium.make("mua_rl/CartPole-v0", pole_half_length=1.0)`. The classes' docstrings give every parameter's unit.

What each shift does to the policy that ships for its family (mean return, 40 held-out episodes; measured by
scripts/make_base_policies.py, see info.json beside each policy): CartPole 500, LongPole 16, LongerPole 19,
ReversedForce 9; Acrobot -84, ReversedTorque -500, WeakMotor -171; Pendulum -119, HighGravity -901, HeavyBob -317,
LongRod -401; HalfCheetah 6837, WeakMotors 229, Heavy 1040, Slippery 1059, HighGravity 1567; Hopper 3315,
WeakMotors 339, Heavy 395, LowGravity 2141. CartPole hardly notices gravity, force or the pole's mass.
Acrobot's two shifts are the extremes: on WeakMotor little can be regained (a policy trained from scratch reaches -150),
and on ReversedTorque the shipped policy never reaches the goal, so PPO has no reward to learn from.
"""

from dataclasses import dataclass, field
from typing import Any

import gymnasium

NAMESPACE = "mua_rl"


@dataclass(frozen=True)
class Family:
    """One Gymnasium task and its shifted versions.

    Attributes:
        name: The task's name in the ids below.
        entry_point: `module:Class` of the environment; its docstring gives the parameters and their units.
        nominal_id: Gymnasium's id of the task that the nominal version equals.
        max_episode_steps: Time limit in environment steps, as in Gymnasium.
        reward_threshold: Mean return that counts as solved, as in Gymnasium; None where it defines none.
        shifts: Name of a shifted version -> the keywords in which it differs from the nominal one.
    """

    name: str
    entry_point: str
    nominal_id: str
    max_episode_steps: int
    reward_threshold: float | None = None
    shifts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def env_id(self, shift: str | None = None) -> str:
        """The id that `gymnasium.make` takes for the nominal version (None) or for a shifted one."""
        return f"{NAMESPACE}/{self.name}-{shift}-v0" if shift else f"{NAMESPACE}/{self.name}-v0"


FAMILIES: tuple[Family, ...] = (
    Family(
        name="CartPole",
        entry_point="mua_rl.envs.control.classic:CartPole",
        nominal_id="CartPole-v1",
        max_episode_steps=500,
        reward_threshold=475.0,
        shifts={
            "LongPole": {"pole_half_length": 1.5},
            "LongerPole": {"pole_half_length": 2.0},
            "ReversedForce": {"force": -10.0},
        },
    ),
    Family(
        name="Acrobot",
        entry_point="mua_rl.envs.control.classic:Acrobot",
        nominal_id="Acrobot-v1",
        max_episode_steps=500,
        reward_threshold=-100.0,
        shifts={
            "ReversedTorque": {"torque": -1.0},
            "WeakMotor": {"torque": 0.5},
        },
    ),
    Family(
        name="Pendulum",
        entry_point="mua_rl.envs.control.classic:Pendulum",
        nominal_id="Pendulum-v1",
        max_episode_steps=200,
        shifts={
            "HighGravity": {"gravity": 15.0},
            "HeavyBob": {"mass": 2.0},
            "LongRod": {"length": 1.5},
        },
    ),
    Family(
        name="HalfCheetah",
        entry_point="mua_rl.envs.control.locomotion:HalfCheetah",
        nominal_id="HalfCheetah-v5",
        max_episode_steps=1000,
        reward_threshold=4800.0,
        shifts={
            "WeakMotors": {"actuator_scale": 0.5},
            "Heavy": {"mass_scale": 2.0},
            "Slippery": {"friction_scale": 0.2},
            "HighGravity": {"gravity": 15.0},
        },
    ),
    Family(
        name="Hopper",
        entry_point="mua_rl.envs.control.locomotion:Hopper",
        nominal_id="Hopper-v5",
        max_episode_steps=1000,
        reward_threshold=3800.0,
        shifts={
            "WeakMotors": {"actuator_scale": 0.5},
            "Heavy": {"mass_scale": 1.5},
            "LowGravity": {"gravity": 5.0},
        },
    ),
)


def register() -> None:
    """Register every nominal and shifted version with Gymnasium (idempotent)."""
    for family in FAMILIES:
        for shift in (None, *family.shifts):
            env_id = family.env_id(shift)
            if env_id not in gymnasium.registry:
                gymnasium.register(
                    env_id,
                    entry_point=family.entry_point,
                    max_episode_steps=family.max_episode_steps,
                    reward_threshold=family.reward_threshold if shift is None else None,
                    kwargs=family.shifts[shift] if shift else {},
                )


register()
