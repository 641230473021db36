"""Gymnasium's MuJoCo walkers with a changeable body: `pip install "gymnasium[mujoco]"`. No display is needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mujoco
import numpy as np
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.mujoco.mujoco_env import MujocoEnv

from mua_rl.errors import UserError


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Drop what MuJoCo says about Gymnasium's own model files: it prints it, and leaves a MUJOCO_LOG.TXT behind."""
    free = hasattr(mujoco, "set_mju_user_warning") and mujoco.get_mju_user_warning() is None
    if free:
        mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        if free:
            mujoco.set_mju_user_warning(None)


class _ShiftedBody(MujocoEnv):
    """A MuJoCo task whose compiled model is changed before the first step.

    Args:
        gravity: Downward acceleration in m/s².
        mass_scale: Factor on every body's mass and inertia (1 = the task's own).
        friction_scale: Factor on the sliding friction of every geom (1 = the task's own).
        actuator_scale: Factor on the torque of the motors at a given action: one number for all of them, or a sequence
            of one per motor in the order of the action space (0 = a dead motor).
        kwargs: Gymnasium's own keywords for the task (`render_mode`, `ctrl_cost_weight`, ...).
    """

    def __init__(
        self,
        *,
        gravity: float = 9.81,
        mass_scale: float = 1.0,
        friction_scale: float = 1.0,
        actuator_scale: float | list[float] = 1.0,
        **kwargs: Any,
    ):
        for name, value in {"gravity": gravity, "mass_scale": mass_scale, "friction_scale": friction_scale}.items():
            if not (np.isfinite(value) and value > 0):
                raise UserError(f"{name} is {value}; it must be a positive, finite number.")
        if not np.all(np.isfinite(actuator_scale)) or np.any(np.asarray(actuator_scale) < 0):
            raise UserError(f"actuator_scale is {actuator_scale}; every entry must be at least 0 and finite.")
        self._shift = (gravity, mass_scale, friction_scale, actuator_scale)
        super().__init__(**kwargs)

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        with _quiet_compiler():
            model, data = super()._initialize_simulation()
        gravity, mass_scale, friction_scale, actuator_scale = self._shift
        if np.ndim(actuator_scale) == 1 and len(actuator_scale) != model.nu:  # type: ignore[arg-type]
            raise UserError(f"actuator_scale has {len(actuator_scale)} entries; this task has {model.nu} motors.")  # type: ignore[arg-type]
        model.opt.gravity[2] = -gravity
        model.body_mass *= mass_scale
        model.body_inertia *= mass_scale
        model.geom_friction[:, 0] *= friction_scale
        model.actuator_gear *= np.broadcast_to(np.asarray(actuator_scale, dtype=float), model.nu)[:, None]
        mujoco.mj_setConst(model, data)  # quantities derived from the masses; it leaves its scratch state in data
        mujoco.mj_resetData(model, data)
        return model, data


class HalfCheetah(_ShiftedBody, HalfCheetahEnv):
    __doc__ = f"HalfCheetah-v5: run forward, at most 1000 steps.\n{(_ShiftedBody.__doc__ or '').partition('.')[2]}"


class Hopper(_ShiftedBody, HopperEnv):
    __doc__ = f"Hopper-v5: hop forward without falling.\n{(_ShiftedBody.__doc__ or '').partition('.')[2]}"
