"""Linear maps of which every robot has its own, behind one transformer that all robots share (GR00T's "projectors").

```
 robot 0  W[0] ---+
 robot 1  W[1] ---+--- x W[robot] + b[robot] ---> tokens of one width, whatever the robot's states and actions are
   ...            |
 robot 31 W[31] --+      a robot's data gives gradients to its own rows and to no other's
```
Named, shaped and initialised as in GR00T, whose weights load here. LeRobot's copies one matrix per sample, 19 MB each
at the published width; where a whole batch is of one robot, named by a number, nothing is copied here.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, relu, silu

SPREAD = 0.02  # of the weights at the start, at any width
LONGEST = 10_000.0  # time constant of the slowest wave, in buckets

Robot = int | Int[Tensor, " b"]  # one number for the whole batch, or one per sample


class CategoryLinear(nn.Module):
    """x W[robot] + b[robot]."""

    def __init__(self, robots: int, width: int, out: int) -> None:
        super().__init__()
        self.W = nn.Parameter(SPREAD * torch.randn(robots, width, out))
        self.b = nn.Parameter(torch.zeros(robots, out))

    def forward(self, x: Float[Tensor, "b n i"], robot: Robot) -> Float[Tensor, "b n o"]:
        if isinstance(robot, int):
            return linear(x, self.W[robot].mT, self.b[robot])
        return torch.baddbmm(self.b[robot][:, None], x, self.W[robot])


class CategoryMLP(nn.Module):
    """Two of them with a ReLU between."""

    def __init__(self, robots: int, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.layer1 = CategoryLinear(robots, width, hidden)
        self.layer2 = CategoryLinear(robots, hidden, out)

    def forward(self, x: Float[Tensor, "b n i"], robot: Robot) -> Float[Tensor, "b n o"]:
        return self.layer2(relu(self.layer1(x, robot)), robot)


class ActionEncoder(nn.Module):
    """Noisy actions and the time, which is the same for every step of a chunk, to one token per step."""

    def __init__(self, robots: int, action: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.W1 = CategoryLinear(robots, action, width)
        self.W2 = CategoryLinear(robots, 2 * width, width)
        self.W3 = CategoryLinear(robots, width, width)

    def forward(
        self, action: Float[Tensor, "b h a"], bucket: Int[Tensor, " b"], robot: Robot
    ) -> Float[Tensor, "b h w"]:
        """`bucket` is the time as `models.layers.dit` counts it, 0 .. 999."""
        seen = self.W1(action, robot)
        time = waves(bucket, self.width, self.width // 2)[:, None].expand(-1, action.shape[1], -1)
        return self.W3(silu(self.W2(torch.cat([seen, time.to(seen.dtype)], dim=-1), robot)), robot)


def waves(bucket: Int[Tensor, " b"], width: int, ratio: int) -> Float[Tensor, "b w"]:
    """sin and cos of `bucket`, at width/2 frequencies LONGEST^(-i / ratio).

    ratio: width/2 leaves the slowest out (GR00T's action encoder), width/2 - 1 takes it in (diffusers' shift of 1).
    The angles reach 999 radians: a period in place of a frequency would round them by 1e-4.
    """
    steps = torch.arange(width // 2, dtype=torch.float32, device=bucket.device)
    angle = bucket.float()[:, None] * torch.exp(steps * (-math.log(LONGEST) / ratio))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
