"""The scripted expert's wish, turned into joint motion: a function of the current state alone.

```
 State -> scene.expert -> Waypoint -> twist of the TCP -> damped least squares -> joint step (rad), gripper
```
Because nothing is remembered, noise added to what is executed is corrected at the next step, and the label of a state
is the same however the state was reached: what behaviour cloning needs.
"""

import numpy as np
from jaxtyping import Float

from data.sim import kinematics, robot
from data.sim.scenes.base import Scene, State, Waypoint

DOWN = np.diag([1.0, -1.0, -1.0])  # the TCP's frame when it points at the table
MAX_JOINT_STEP = 0.04  # rad per control step, below the action's limit: room for noise
MAX_TURN = 0.1  # rad per control step
POSTURE_GAIN = 0.1  # share of the way back to the rest posture per step, in the one spare degree of freedom
TRACKING = 0.6  # share of the remaining way asked for in one step: smooth arrival, no overshoot


def joint_motion(scene: Scene, state: State) -> tuple[Float[np.ndarray, "7"], float]:
    """The expert's joint step (rad) and gripper command (+1 opens, -1 closes) for `state`."""
    waypoint = scene.expert(state)
    _, jacobian = kinematics.forward(state.q)
    step = kinematics.joint_step(jacobian, _twist(waypoint, state), POSTURE_GAIN * (robot.REST - state.q))
    return step * min(1.0, MAX_JOINT_STEP / max(np.abs(step).max(), 1e-9)), waypoint.gripper


def _twist(waypoint: Waypoint, state: State) -> Float[np.ndarray, "6"]:
    """Where the TCP should move (m) and turn (rad) within one step."""
    move = TRACKING * (waypoint.position - state.tcp)
    turn = TRACKING * kinematics.rotation_vector(DOWN @ state.tcp_rotation.T)
    return np.concatenate([_at_most(move, waypoint.speed), _at_most(turn, MAX_TURN)])


def _at_most(vector: Float[np.ndarray, "n"], length: float) -> Float[np.ndarray, "n"]:
    return vector * min(1.0, length / max(float(np.linalg.norm(vector)), 1e-9))
