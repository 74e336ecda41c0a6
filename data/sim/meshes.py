"""Low-polygon shapes as arrays. SAPIEN's own capsules have thousands of triangles; software pays for each."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt32


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """`v` vertices and `t` triangles, counter-clockwise seen from outside; lengths in metres."""

    vertices: Float32[np.ndarray, "v 3"]
    normals: Float32[np.ndarray, "v 3"]
    uvs: Float32[np.ndarray, "v 2"]
    triangles: UInt32[np.ndarray, "t 3"]


def box(center: tuple[float, float, float], half_size: tuple[float, float, float]) -> Mesh:
    """An axis-aligned box, flat-shaded: 12 triangles, a whole texture on each face."""
    vertices, normals = [], []
    for axis in range(3):
        for sign in (-1.0, 1.0):
            u, v = ((axis + 1) % 3, (axis + 2) % 3) if sign > 0 else ((axis + 2) % 3, (axis + 1) % 3)
            for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
                corner = np.zeros(3)
                corner[axis], corner[u], corner[v] = sign, a, b
                vertices.append(np.asarray(center) + corner * half_size)
                normals.append(np.eye(3)[axis] * sign)
    uvs = np.tile([[0, 0], [1, 0], [1, 1], [0, 1]], (6, 1))
    faces = np.concatenate([np.array([[0, 1, 2], [0, 2, 3]]) + 4 * face for face in range(6)])
    return _mesh(vertices, normals, uvs, faces)


def capsule(start: tuple[float, ...], end: tuple[float, ...], radius: float, sides: int = 12, rings: int = 2) -> Mesh:
    """A cylinder from `start` to `end` with round ends, smooth-shaded. `start` may equal `end`: a sphere."""
    angles = np.linspace(0, np.pi / 2, rings + 1)
    profile = [(-np.cos(a), np.sin(a), start) for a in angles] + [(np.cos(a), np.sin(a), end) for a in angles[::-1]]
    return _revolve(profile, start, end, radius, sides)


def cylinder(start: tuple[float, ...], end: tuple[float, ...], radius: float, sides: int = 12) -> Mesh:
    """A cylinder from `start` to `end` with flat ends."""
    return merge(
        _revolve([(0.0, 1.0, start), (0.0, 1.0, end)], start, end, radius, sides),
        _disc(start, np.subtract(start, end), radius, sides),
        _disc(end, np.subtract(end, start), radius, sides),
    )


def merge(*meshes: Mesh) -> Mesh:
    """One mesh of several, so that a link costs one draw call."""
    offsets = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes[:-1])])
    return _mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.normals for mesh in meshes]),
        np.concatenate([mesh.uvs for mesh in meshes]),
        np.concatenate([mesh.triangles + offset for mesh, offset in zip(meshes, offsets, strict=True)]),
    )


def _mesh(vertices, normals, uvs, triangles) -> Mesh:
    return Mesh(
        vertices=np.asarray(vertices, np.float32),
        normals=np.asarray(normals, np.float32),
        uvs=np.asarray(uvs, np.float32),
        triangles=np.asarray(triangles, np.uint32),
    )


def _frame(direction: np.ndarray) -> np.ndarray:
    """Rows x, y, z of a right-handed frame with z along `direction` (world z if that has no length)."""
    length = np.linalg.norm(direction)
    z = direction / length if length > 1e-9 else np.array([0.0, 0.0, 1.0])
    x = np.cross([0.0, 1.0, 0.0] if abs(z[1]) < 0.9 else [1.0, 0.0, 0.0], z)
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z])


def _revolve(profile, start, end, radius: float, sides: int) -> Mesh:
    """Rings of (height, width, centre), both in radii, turned about the axis from `start` to `end`."""
    frame = _frame(np.subtract(end, start))
    turn = np.linspace(0, 2 * np.pi, sides, endpoint=False)
    circle = np.outer(np.cos(turn), frame[0]) + np.outer(np.sin(turn), frame[1])
    normals = [height * frame[2] + width * circle for height, width, _ in profile]
    vertices = [np.asarray(center) + radius * normal for (_, _, center), normal in zip(profile, normals, strict=True)]
    triangles = []
    for ring in range(len(profile) - 1):
        for side in range(sides):
            a, b = ring * sides + side, ring * sides + (side + 1) % sides
            triangles += [[a, b, b + sides], [a, b + sides, a + sides]]
    count = len(profile) * sides
    return _mesh(np.concatenate(vertices), np.concatenate(normals), np.zeros((count, 2)), triangles)


def _disc(center, normal, radius: float, sides: int) -> Mesh:
    frame = _frame(np.asarray(normal, float))
    turn = np.linspace(0, 2 * np.pi, sides, endpoint=False)
    rim = np.asarray(center) + radius * (np.outer(np.cos(turn), frame[0]) + np.outer(np.sin(turn), frame[1]))
    triangles = [[0, i, i + 1] for i in range(1, sides - 1)]
    return _mesh(rim, np.tile(frame[2], (sides, 1)), np.zeros((sides, 2)), triangles)
