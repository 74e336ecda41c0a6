"""What a row means: feature names, shapes, units and conventions, as one value that datasets and policies compare.

```
 o_t  -- a_t -->  o_{t+1}        image[t] and state[t] are seen BEFORE action[t] is executed
                                 reward, success and sub-goals of row t are what action[t] caused
```
"""

from dataclasses import asdict, dataclass

from data.errors import BadInput

IMAGE = "observation.images."  # + camera name
STATE = "observation.state"
ACTION = "action"
REWARD = "next.reward"
SUCCESS = "next.success"
TERMINATED = "terminated"
TRUNCATED = "truncated"
SUBGOAL = "subgoal."  # + predicate name; true after the row's action


@dataclass(frozen=True, kw_only=True)
class Component:
    """One scalar of a state or action vector."""

    name: str  # e.g. "joint_0.pos"
    unit: str  # "rad", "m", "1" (dimensionless), "?" (not declared by the dataset)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The features a dataset offers, or a policy was trained on.

    Two schemas fit when every field a policy relies on is equal; see `refuse_unless_fits`.
    """

    cameras: tuple[str, ...]  # in the order a policy stacks them
    image_size: tuple[int, int]  # height, width in pixels
    state: tuple[Component, ...]
    action: tuple[Component, ...]
    fps: int  # control rate, Hz
    control_mode: str  # "delta_qpos", "qpos", "delta_ee_pose", or "?" when the dataset does not say
    gripper: str = "+1 opens"  # meaning of the last action component
    orientation: str = "upright"  # row 0 of a picture is the top, as a person sees the scene

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> "Schema":
        return cls(
            **{
                **value,
                "cameras": tuple(value["cameras"]),
                "image_size": tuple(value["image_size"]),
                "state": tuple(Component(**c) for c in value["state"]),
                "action": tuple(Component(**c) for c in value["action"]),
            }
        )

    def refuse_unless_fits(self, other: "Schema", *, mine: str, others: str) -> None:
        """Raise `BadInput` naming the first feature in which `other` differs.

        `mine` and `others` say in words whose schemas these are, e.g. "checkpoint X" and "dataset Y".
        """
        for name in self.__dataclass_fields__:
            a, b = getattr(self, name), getattr(other, name)
            if a != b:
                raise BadInput(
                    f"{others}: {name} is {_brief(b)}, but {mine} expects {_brief(a)}; "
                    "use data recorded with the same schema, or train on this one"
                )


def _brief(value: object) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], Component):
        return "[" + " ".join(f"{c.name}({c.unit})" for c in value) + "]"
    return str(value)
