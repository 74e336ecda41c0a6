"""What a simulator knows and no policy sees: where the bodies of a recorded episode were.

Nothing of it is recorded. An episode is a function of its configuration, seed and actions, so it is executed again,
without pictures (about 0.5 ms a step), and every state along the way is what it was to the last bit.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float32

from data.episode import Episode
from data.errors import BadInput
from data.schema import STATE
from data.sim.config import SimConfig
from data.sim.env import FlywheelEnv


def body_positions(config: SimConfig, episode: Episode) -> dict[str, Float32[np.ndarray, "l 3"]]:
    """Metres from the robot's base frame, by name of the body, in the state that each o_t shows.

    Raises `BadInput` when the episode does not come out as it was recorded: another scene, another version of it.
    """
    env = FlywheelEnv(replace(config, scene=episode.scene, renderer="none", expert=False))
    observation, _ = env.reset(seed=episode.seed)
    positions: list[dict[str, np.ndarray]] = []
    for t, action in enumerate(episode.action):
        if not np.array_equal(observation[STATE], episode.state[t]):
            raise BadInput(
                f"seed {episode.seed} of {episode.scene}: step {t} is another one now than when it was recorded; "
                "collect anew with this version"
            )
        positions.append(env.positions())
        observation, *_ = env.step(action)
    env.close()
    return {name: np.stack([row[name] for row in positions]) for name in positions[0]}
