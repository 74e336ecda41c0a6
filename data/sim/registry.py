"""The table of scenes."""

from data.registry import Registry

SCENES = Registry(
    "scene",
    {
        "reach": "data.sim.scenes.reach:SCENE",
        "push_cube": "data.sim.scenes.push_cube:SCENE",
        "pick_cube": "data.sim.scenes.pick_cube:SCENE",
        "place_in_bin": "data.sim.scenes.place_in_bin:SCENE",
        "stack_cubes": "data.sim.scenes.stack_cubes:SCENE",
    },
)
