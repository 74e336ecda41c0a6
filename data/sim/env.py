"""One robot, one scene, as a Gymnasium environment over SAPIEN.

```
 reset(seed) -> o_0, info_0        info_t: predicates of the state that o_t shows, and the expert's action for it
 step(a_0)   -> o_1, r_0, ..., info_1
                     r_0 = 1 exactly when a_0 completed the task, else 0; then `terminated` is set
```
An observation never holds an object's pose: what a policy knows, it sees.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from jaxtyping import Float32, UInt8

from data.errors import BadInput
from data.schema import IMAGE, STATE
from data.sim import controllers, oracle
from data.sim.config import STATE_COMPONENTS, SimConfig
from data.sim.looks import Looks
from data.sim.randomization import Drawn, draw
from data.sim.registry import SCENES
from data.sim.scenes.base import Scene, State
from data.sim.world import World


class FlywheelEnv(gym.Env):
    """See the drawing above. `info` after reset and step has

    * "subgoals": predicate name -> bool;
    * "success": bool, the scene's success has held for its `hold_steps`;
    * "expert_action": float32, if `config.expert`;
    * after reset also "randomization" (flat, JSON-able) and "task" (the instruction).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012 (gymnasium's own form)

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.render_mode = "rgb_array" if config.seen else None
        self.scene: Scene = SCENES.resolve(config.scene)
        self.max_steps = config.max_steps or self.scene.max_steps
        height, width = config.image_size
        pictures = {IMAGE + camera: gym.spaces.Box(0, 255, (height, width, 3), np.uint8) for camera in config.seen}
        vector = gym.spaces.Box(-np.inf, np.inf, (len(STATE_COMPONENTS),), np.float32)
        self.observation_space = gym.spaces.Dict({**pictures, STATE: vector})
        self.action_space = gym.spaces.Box(-1, 1, (len(config.schema().action),), np.float32)
        self._world: World  # of the running episode, from the first reset on
        self._looks: Looks | None = None  # if there are cameras
        self._resets = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict[str, Any]]:
        """Build what `seed` draws. Without one, the environment's own generator picks the next seed."""
        super().reset(seed=seed)
        self.seed = int(self.np_random.integers(2**31)) if seed is None else seed
        drawn = draw(self.config.randomization, self.scene, self.seed)
        if self.config.seen:
            self._fresh_looks().apply(drawn)
        self._begin(drawn)
        info = self._info()
        return self._observation(), {**info, "randomization": drawn.summary(), "task": self.scene.task}

    def step(self, action: Float32[np.ndarray, "a"]) -> tuple[dict, float, bool, bool, dict[str, Any]]:
        """Execute one action for 1/control_hz seconds. Values beyond [-1, 1] are clipped."""
        action = np.array(action, np.float32)  # a copy: the caller may reuse its buffer
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise BadInput(
                f"action for {self.config.scene}: {action.shape} {action}; "
                f"{self.action_space.shape} finite numbers are needed"[:199]
            )
        self._execute(action)
        info = self._info()
        terminated = info["success"]
        truncated = len(self._actions) >= self.max_steps and not terminated
        return self._observation(), float(terminated), terminated, truncated, info

    def render(self) -> np.ndarray | None:
        """The first camera's picture."""
        return next(iter(self._pictures().values()), None)

    def get_state(self) -> dict[str, Any]:
        """This moment: the seed and what was done since. For `set_state` of any environment of equal configuration."""
        return {"seed": self.seed, "actions": np.array(self._actions, np.float32)}

    def set_state(self, saved: dict[str, Any]) -> tuple[dict, dict[str, Any]]:
        """Return to a saved moment, and what `step` returned there as (observation, info).

        The physics is re-executed, without pictures, at about 0.5 ms a step: poses and velocities written into PhysX
        would continue differently in the last bits, because its contact caches cannot be written.
        """
        self.reset(seed=saved["seed"])
        for action in saved["actions"]:
            self._execute(action)
        return self._observation(), self._info()

    def positions(self) -> dict[str, Float32[np.ndarray, "3"]]:
        """Centre of each body, m: for probes of what a network has understood, never for a policy."""
        return {name: p.astype(np.float32) for name, p in self._state.positions.items()}

    def close(self) -> None:
        self._looks = None

    def _begin(self, drawn: Drawn) -> None:
        timestep = 1 / (self.config.control_hz * self.config.substeps)
        self._world = World(self.scene, drawn, timestep=timestep)
        self._state = self._world.state()
        self._actions: list[np.ndarray] = []
        self._held_for = 0

    def _execute(self, action: Float32[np.ndarray, "a"]) -> None:
        self._actions.append(action)
        action = np.minimum(np.maximum(action.astype(np.float64), -1), 1)  # np.clip takes five times as long
        joints = controllers.controller(self.config.control_mode).target(action, self._state.q)
        self._world.drive(joints, controllers.finger_target(action[-1]))
        self._world.advance(self.config.substeps)
        self._state = self._world.state()
        self._held_for = self._held_for + 1 if self.scene.success(self._state) else 0

    def _fresh_looks(self) -> Looks:
        """The looks, built anew when they are due."""
        interval = self.config.scene_reset_interval
        if self._looks is None or (interval and self._resets % interval == 0):
            self._looks = Looks(
                self.scene,
                cameras=self.config.seen,
                image_size=self.config.image_size,
                robot_body=self.config.robot_body,
                device=self.config.device,
            )
        self._resets += 1
        return self._looks

    def _observation(self) -> dict[str, np.ndarray]:
        return {**self._pictures(), STATE: proprioception(self._state)}

    def _pictures(self) -> dict[str, UInt8[np.ndarray, "height width 3"]]:
        if not self._looks:
            return {}
        return {IMAGE + camera: picture for camera, picture in self._looks.take(self._world.poses()).items()}

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = {
            "subgoals": {name: bool(holds(self._state)) for name, holds in self.scene.subgoals.items()},
            "success": self._held_for >= self.scene.hold_steps,
        }
        if self.config.expert:
            step, gripper = oracle.joint_motion(self.scene, self._state)
            info["expert_action"] = controllers.encode(self.config.control_mode, self._state.q, step, gripper)
        return info


def proprioception(state: State) -> Float32[np.ndarray, "s"]:
    """STATE_COMPONENTS of a state."""
    quaternion = state.tcp_quaternion if state.tcp_quaternion[1] >= 0 else -state.tcp_quaternion
    return np.concatenate([state.q, [state.opening], state.tcp, quaternion]).astype(np.float32)
