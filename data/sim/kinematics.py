"""The Panda's forward kinematics, Jacobian and damped least squares, in plain numpy.

Frames follow Franka's published table (modified Denavit-Hartenberg): joint i turns about its own z.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

# Where each joint's frame sits in its parent's at zero angle: x, y, z in metres, and a roll about x in radians.
JOINT_ORIGINS = (
    ((0.0, 0.0, 0.333), 0.0),
    ((0.0, 0.0, 0.0), -np.pi / 2),
    ((0.0, -0.316, 0.0), np.pi / 2),
    ((0.0825, 0.0, 0.0), np.pi / 2),
    ((-0.0825, 0.384, 0.0), -np.pi / 2),
    ((0.0, 0.0, 0.0), np.pi / 2),
    ((0.088, 0.0, 0.0), np.pi / 2),
)
JOINT_LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])  # rad
JOINT_HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])  # rad
FLANGE_HEIGHT = 0.107  # m along z of joint 7's frame; the hand sits there, turned by -45 degrees
HAND_TURN = -np.pi / 4
TCP_HEIGHT = 0.1034  # m from the hand's frame to the point between the finger pads


def _roll_matrices() -> np.ndarray:
    fixed = np.tile(np.eye(4), (7, 1, 1))
    for matrix, (position, roll) in zip(fixed, JOINT_ORIGINS, strict=True):
        c, s = np.cos(roll), np.sin(roll)
        matrix[:3, :3] = [[1, 0, 0], [0, c, -s], [0, s, c]]
        matrix[:3, 3] = position
    return fixed


def _tool_matrix() -> np.ndarray:
    c, s = np.cos(HAND_TURN), np.sin(HAND_TURN)
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, FLANGE_HEIGHT + TCP_HEIGHT], [0, 0, 0, 1]])


_FIXED = _roll_matrices()
_TOOL = _tool_matrix()


def forward(q: Float[np.ndarray, "7"]) -> tuple[Float[np.ndarray, "4 4"], Float[np.ndarray, "6 7"]]:
    """TCP pose in the robot's base frame, and the Jacobian of (linear, angular) velocity there, for angles in rad."""
    pose = np.eye(4)
    axes, origins = np.empty((7, 3)), np.empty((7, 3))
    turn = np.eye(4)
    for i in range(7):
        c, s = np.cos(q[i]), np.sin(q[i])
        turn[0, 0], turn[0, 1], turn[1, 0], turn[1, 1] = c, -s, s, c
        pose = pose @ _FIXED[i] @ turn
        axes[i], origins[i] = pose[:3, 2], pose[:3, 3]
    pose = pose @ _TOOL
    lever = pose[:3, 3] - origins
    linear = np.stack(
        [
            axes[:, 1] * lever[:, 2] - axes[:, 2] * lever[:, 1],
            axes[:, 2] * lever[:, 0] - axes[:, 0] * lever[:, 2],
            axes[:, 0] * lever[:, 1] - axes[:, 1] * lever[:, 0],
        ]
    )
    return pose, np.concatenate([linear, axes.T])


def joint_step(
    jacobian: Float[np.ndarray, "6 7"],
    twist: Float[np.ndarray, "6"],
    posture: Float[np.ndarray, "7"],
    damping: float = 0.02,
) -> Float[np.ndarray, "7"]:
    """Joint motion (rad) that moves the TCP by `twist` (m, rad) and, where that leaves freedom, by `posture`.

    Damped least squares: dq = J⁺ twist + (I - J⁺ J) posture with J⁺ = Jᵀ (J Jᵀ + λ² I)⁻¹ (Wampler 1986).
    """
    inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + damping**2 * np.eye(6))
    return inverse @ twist + posture - inverse @ (jacobian @ posture)


def rotation_vector(rotation: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "3"]:
    """Axis times angle (rad) of a rotation matrix; angles stay below pi here."""
    sine = 0.5 * np.array(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    length = np.linalg.norm(sine)
    angle = np.arctan2(length, 0.5 * (np.trace(rotation) - 1.0))
    return sine if length < 1e-9 else sine / length * angle


def rotation_matrix(q: Sequence[float]) -> Float[np.ndarray, "3 3"]:
    """The rotation matrix of a unit quaternion (w, x, y, z)."""
    w, x, y, z = q
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
