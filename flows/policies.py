"""`flywheel policies`: what a recipe can name, plugins included."""

from models.custom import BasePolicy
from models.pair import fitting_heads
from models.registry import BACKBONES, HEADS, POLICIES
from models.zoo import PRESETS, ZOO


def show() -> None:
    """Print the policies by name, each with its parts, and for each backbone the heads that fit it."""
    print(f"by name: models.zoo.named(NAME, PRESET), each as {', '.join(PRESETS)}\n")
    for name, entry in ZOO.items():
        needs = _listed(HEADS.resolve(entry.head).needs)
        print(f"  {name:<16}  {entry.parts:<33}  reads {needs:<6}  {entry.about}")
    own = [name for name in POLICIES if issubclass(POLICIES.resolve(name), BasePolicy)]
    print(f"\nfrom plugins, by --policy.kind: {', '.join(own) or 'none'}")
    print("\nany pair that fits, by --policy.backbone and --policy.head\n")
    for backbone in BACKBONES:
        part = BACKBONES.resolve(backbone)
        print(f"  {backbone:<16}  gives {_listed(part.gives):<22}  {', '.join(fitting_heads(part))}")


def _listed(fields: frozenset[str]) -> str:
    return ", ".join(sorted(fields))
