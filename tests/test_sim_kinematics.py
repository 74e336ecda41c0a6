"""Our Panda's kinematics against SAPIEN's own, and the shapes it is drawn with."""

import sys

import numpy as np
import pytest

from data.errors import BadInput
from data.sim import kinematics, meshes, robot
from data.sim.driver import load_sapien

RNG = np.random.default_rng(0)
ANGLES = RNG.uniform(kinematics.JOINT_LOW, kinematics.JOINT_HIGH, (4, 7))


def test_forward_kinematics_is_the_simulated_robots():
    sapien = load_sapien()
    sim = sapien.Scene([sapien.physx.PhysxCpuSystem()])
    panda = robot.build(sapien, sim)
    hand = next(link for link in panda.links if link.name == robot.HAND)
    for q in ANGLES:
        panda.set_qpos(np.append(q, [0.01, 0.02]))
        tcp = hand.entity_pose * sapien.Pose([0, 0, kinematics.TCP_HEIGHT])
        pose, _ = kinematics.forward(q)
        np.testing.assert_allclose(tcp.p - np.array(robot.BASE), pose[:3, 3], atol=1e-6)
        np.testing.assert_allclose(kinematics.rotation_matrix(tcp.q), pose[:3, :3], atol=1e-5)


def test_rest_posture_points_down_above_the_origin():
    pose, _ = kinematics.forward(robot.REST)
    np.testing.assert_allclose(pose[:3, 3] + robot.BASE, [0, 0, 0.17], atol=2e-3)
    np.testing.assert_allclose(pose[:3, :3], np.diag([1, -1, -1]), atol=1e-9)


@pytest.mark.parametrize("q", ANGLES)
def test_jacobian_is_the_derivative(q):
    pose, jacobian = kinematics.forward(q)
    for joint, column in enumerate(jacobian.T):
        moved, _ = kinematics.forward(q + 1e-6 * np.eye(7)[joint])
        turn = kinematics.rotation_vector(moved[:3, :3] @ pose[:3, :3].T)
        np.testing.assert_allclose(np.append(moved[:3, 3] - pose[:3, 3], turn) / 1e-6, column, atol=1e-5)


def test_joint_step_moves_the_tcp_as_asked_whatever_the_posture_wants():
    _, jacobian = kinematics.forward(robot.REST)
    twist = np.array([0.01, -0.02, 0.01, 0.0, 0.05, 0.0])
    for posture in (np.zeros(7), RNG.normal(size=7)):
        step = kinematics.joint_step(jacobian, twist, posture, damping=1e-6)
        np.testing.assert_allclose(jacobian @ step, twist, atol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "volume"),
    [
        (meshes.box((1, 2, 3), (0.1, 0.2, 0.3)), 8 * 0.1 * 0.2 * 0.3),
        (meshes.capsule((0, 0, 0), (0, 1, 0), 0.5, sides=64, rings=16), np.pi * 0.25 + 4 / 3 * np.pi * 0.125),
        (meshes.capsule((0, 0, 1), (0, 0, 1), 0.5, sides=64, rings=16), 4 / 3 * np.pi * 0.125),
    ],
)
def test_meshes_are_closed_and_face_outwards(mesh, volume):
    """The signed volume is right only if every triangle is there and turns the right way."""
    a, b, c = mesh.vertices[mesh.triangles].astype(float).transpose(1, 0, 2)
    assert np.einsum("ti,ti->t", a, np.cross(b, c)).sum() / 6 == pytest.approx(volume, rel=0.01)
    towards = np.einsum("ti,ti->t", np.cross(b - a, c - a), mesh.normals[mesh.triangles[:, 0]])
    assert (towards > -1e-9).all()


def test_the_mesh_body_names_the_package_it_needs(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(BadInput, match="example-robot-data"):
        robot.visuals("mesh")
