"""Gymnasium's classic control tasks with their physical constants as keywords (SI units)."""

import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control.acrobot import AcrobotEnv
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.envs.classic_control.pendulum import PendulumEnv

from mua_rl.errors import UserError


def _require_positive(**parameters: float) -> None:
    for name, value in parameters.items():
        if not (np.isfinite(value) and value > 0):
            raise UserError(f"{name} is {value}; it must be a positive, finite number.")


class CartPole(CartPoleEnv):
    """CartPole-v1 with changeable physics: reward 1 for every step until the pole tips over or 500 steps have passed.

    Args:
        gravity: In m/s².
        cart_mass, pole_mass: In kg.
        pole_half_length: Half the pole's length, from the pivot to its centre of mass, in m.
        force: Push of action 1 in N; action 0 pushes by its negative. A negative force swaps the two actions.
        render_mode: As in Gymnasium.
    """

    def __init__(
        self,
        *,
        gravity: float = 9.8,
        cart_mass: float = 1.0,
        pole_mass: float = 0.1,
        pole_half_length: float = 0.5,
        force: float = 10.0,
        render_mode: str | None = None,
    ):
        _require_positive(
            gravity=gravity,
            cart_mass=cart_mass,
            pole_mass=pole_mass,
            pole_half_length=pole_half_length,
            abs_force=abs(force),
        )
        super().__init__(render_mode=render_mode)
        self.gravity = gravity
        self.masscart = cart_mass
        self.masspole = pole_mass
        self.total_mass = cart_mass + pole_mass
        self.length = pole_half_length
        self.polemass_length = pole_mass * pole_half_length
        self.force_mag = force


class Acrobot(AcrobotEnv):
    """Acrobot-v1 with changeable physics: reward -1 for every step until the tip is one unit above the pivot.

    Args:
        torque: Torque of action 2 on the joint between the links in N·m; action 0 gives its negative, action 1 none.
        link_1_mass, link_2_mass: In kg.
        link_1_length: Length of the link at the pivot, in m; its centre of mass stays at half of it. (The height that
            ends the episode, 1 m above the pivot, and the second link's length of 1 m stay as they are.)
        render_mode: As in Gymnasium.
    """

    def __init__(
        self,
        *,
        torque: float = 1.0,
        link_1_mass: float = 1.0,
        link_2_mass: float = 1.0,
        link_1_length: float = 1.0,
        render_mode: str | None = None,
    ):
        _require_positive(
            abs_torque=abs(torque), link_1_mass=link_1_mass, link_2_mass=link_2_mass, link_1_length=link_1_length
        )
        super().__init__(render_mode=render_mode)
        self.AVAIL_TORQUE = [-torque, 0.0, torque]
        self.LINK_MASS_1 = link_1_mass
        self.LINK_MASS_2 = link_2_mass
        self.LINK_LENGTH_1 = link_1_length
        self.LINK_COM_POS_1 = link_1_length / 2


class Pendulum(PendulumEnv):
    """Pendulum-v1 with changeable physics: swing the rod up and hold it; reward is minus a quadratic cost.

    Args:
        gravity: In m/s².
        mass: Of the rod, in kg.
        length: Of the rod, in m.
        max_torque: Largest torque in N·m. It bounds the action space too, so change it only for a policy trained with
            the same bound; to weaken the motor under an unchanged action space, raise `mass` or `gravity` instead.
        render_mode: As in Gymnasium.
    """

    def __init__(
        self,
        *,
        gravity: float = 10.0,
        mass: float = 1.0,
        length: float = 1.0,
        max_torque: float = 2.0,
        render_mode: str | None = None,
    ):
        _require_positive(gravity=gravity, mass=mass, length=length, max_torque=max_torque)
        super().__init__(render_mode=render_mode, g=gravity)
        self.m = mass
        self.l = length
        self.max_torque = max_torque
        self.action_space = spaces.Box(-max_torque, max_torque, shape=(1,), dtype=np.float32)
