"""Every knob draws from its own stream, and what it draws is sensible."""

from dataclasses import fields, replace

import numpy as np
import pytest

from data.sim.randomization import CLUTTER_RADIUS, Drawn, Randomization, draw, texture
from data.sim.registry import SCENES

ALL = Randomization(
    random_background=True,
    random_light=True,
    random_appearance=True,
    cluttered_table=True,
    random_table_height=0.03,
    camera_jitter=0.02,
)
OWNS = {
    "random_background": {"table_texture", "wall_texture", "floor_texture"},
    "random_light": {"ambient", "sun", "sun_direction"},
    "random_appearance": {"robot_shade", "object_shade"},
    "cluttered_table": {"clutter"},
    "random_table_height": {"table_drop"},
    "camera_jitter": {"head_offset", "wrist_offset"},
}


@pytest.mark.parametrize("knob", OWNS)
def test_switching_one_knob_changes_only_what_it_owns(knob):
    scene = SCENES.resolve("place_in_bin")
    off = type(getattr(ALL, knob))(0)
    for seed in range(5):
        with_it, without = draw(ALL, scene, seed), draw(replace(ALL, **{knob: off}), scene, seed)
        changed = {f.name for f in fields(Drawn) if getattr(with_it, f.name) != getattr(without, f.name)}
        assert changed == OWNS[knob]


def test_all_off_varies_only_the_layout():
    scene = SCENES.resolve("pick_cube")
    one, other = draw(Randomization(), scene, 1), draw(Randomization(), scene, 2)
    assert one.layout != other.layout
    assert replace(one, layout={}) == replace(other, layout={}) == Drawn(layout={})


@pytest.mark.parametrize("name", SCENES)
def test_clutter_keeps_clear_of_the_task_and_of_itself(name):
    scene = SCENES.resolve(name)
    for seed in range(30):
        drawn = draw(ALL, scene, seed)
        spots = [(item.x, item.y, CLUTTER_RADIUS) for item in drawn.clutter]
        spots += [(drawn.layout[body.name].x, drawn.layout[body.name].y, body.clearance) for body in scene.bodies]
        for i, item in enumerate(drawn.clutter):
            for x, y, radius in spots[i + 1 :]:
                assert np.hypot(item.x - x, item.y - y) > CLUTTER_RADIUS + radius
    assert len({len(draw(ALL, scene, seed).clutter) for seed in range(30)}) > 1


def test_the_summary_is_flat_and_plain():
    summary = draw(ALL, SCENES.resolve("stack_cubes"), 0).summary()
    assert {type(value) for value in summary.values()} <= {int, float, bool, str}
    assert {"layout.cube.x", "sun.2", "table_drop", "clutter", "object_shade.base"} <= set(summary)


def test_textures_follow_their_seed_and_the_plain_one_is_plain():
    np.testing.assert_array_equal(texture(7, (0, 0, 0)), texture(7, (1, 1, 1)))
    assert (texture(7, (0, 0, 0)) != texture(8, (0, 0, 0))).any()
    assert np.ptp(texture(None, (0.2, 0.4, 0.6)), axis=(0, 1)).max() == 0
    assert all(np.ptp(texture(seed, (0, 0, 0))[..., :3]) > 10 for seed in range(20))
