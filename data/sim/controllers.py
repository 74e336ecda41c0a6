"""What an action means: normalised numbers in [-1, 1] to joint targets, and back for the expert.

| mode          | components                                | one unit is                                    |
|---------------|-------------------------------------------|------------------------------------------------|
| delta_qpos    | 7 joint steps, gripper                    | 0.05 rad from where the joint is now            |
| qpos          | 7 joint angles, gripper                   | half the joint's range from its middle         |
| delta_ee_pose | TCP step x y z, turn x y z (base), gripper| 0.04 m, 0.15 rad from where the TCP is now     |

The gripper is absolute in all: +1 opens, -1 closes and presses, between is linear.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from data.errors import BadInput
from data.registry import did_you_mean
from data.schema import Component
from data.sim import kinematics
from data.sim.robot import FINGER_TRAVEL, REST

JOINT_STEP = 0.05  # rad
TCP_STEP = 0.04  # m
TCP_TURN = 0.15  # rad
SQUEEZE = 0.01  # m beyond shut: what a closed gripper presses with

_GRIPPER = Component(name="gripper.target", unit="1")
_MIDDLE = (kinematics.JOINT_HIGH + kinematics.JOINT_LOW) / 2
_HALF_RANGE = (kinematics.JOINT_HIGH - kinematics.JOINT_LOW) / 2


@dataclass(frozen=True, kw_only=True)
class DeltaQpos:
    """Joint steps from the present angles."""

    components = (*(Component(name=f"joint_{i}.delta", unit="0.05 rad") for i in range(7)), _GRIPPER)

    def target(self, action: Float[np.ndarray, "8"], q: Float[np.ndarray, "7"]) -> Float[np.ndarray, "7"]:
        return q + JOINT_STEP * action[:7]

    def encode(self, q: Float[np.ndarray, "7"], step: Float[np.ndarray, "7"]) -> Float[np.ndarray, "7"]:
        return step / JOINT_STEP


@dataclass(frozen=True, kw_only=True)
class Qpos:
    """Joint angles."""

    components = (*(Component(name=f"joint_{i}.target", unit="1") for i in range(7)), _GRIPPER)

    def target(self, action: Float[np.ndarray, "8"], q: Float[np.ndarray, "7"]) -> Float[np.ndarray, "7"]:
        return _MIDDLE + _HALF_RANGE * action[:7]

    def encode(self, q: Float[np.ndarray, "7"], step: Float[np.ndarray, "7"]) -> Float[np.ndarray, "7"]:
        return (q + step - _MIDDLE) / _HALF_RANGE


@dataclass(frozen=True, kw_only=True)
class DeltaEePose:
    """TCP steps in the base frame, solved by damped least squares; the spare joint drifts to its rest."""

    components = (
        *(Component(name=f"tcp.delta_{axis}", unit="0.04 m") for axis in "xyz"),
        *(Component(name=f"tcp.turn_{axis}", unit="0.15 rad") for axis in "xyz"),
        _GRIPPER,
    )

    def target(self, action: Float[np.ndarray, "7"], q: Float[np.ndarray, "7"]) -> Float[np.ndarray, "7"]:
        _, jacobian = kinematics.forward(q)
        twist = np.concatenate([TCP_STEP * action[:3], TCP_TURN * action[3:6]])
        return q + kinematics.joint_step(jacobian, twist, 0.1 * (REST - q))

    def encode(self, q: Float[np.ndarray, "7"], step: Float[np.ndarray, "7"]) -> Float[np.ndarray, "6"]:
        _, jacobian = kinematics.forward(q)
        return jacobian @ step / np.repeat([TCP_STEP, TCP_TURN], 3)


CONTROLLERS = {"delta_qpos": DeltaQpos(), "qpos": Qpos(), "delta_ee_pose": DeltaEePose()}


def controller(mode: str) -> DeltaQpos | Qpos | DeltaEePose:
    """The controller of `mode`. Raises `BadInput` with a did-you-mean."""
    if mode not in CONTROLLERS:
        raise BadInput(f"unknown control_mode {mode!r}{did_you_mean(mode, CONTROLLERS)}")
    return CONTROLLERS[mode]


def finger_target(gripper: float) -> float:
    """Where each finger's drive is sent, in metres, for a gripper command in [-1, 1]."""
    return (FINGER_TRAVEL + SQUEEZE) * (float(gripper) + 1) / 2 - SQUEEZE


def encode(
    mode: str, q: Float[np.ndarray, "7"], step: Float[np.ndarray, "7"], gripper: float
) -> Float32[np.ndarray, "a"]:
    """The action that asks for a joint `step` (rad) from `q` and a gripper command, clipped to [-1, 1]."""
    action = np.append(controller(mode).encode(q, step), gripper)
    return np.clip(action, -1, 1).astype(np.float32)
