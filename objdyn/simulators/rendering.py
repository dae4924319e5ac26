"""Pictures of solids on a grey floor, each with the mask of its solids; the look is that of CLEVR.

``mujoco`` draws with OpenGL, some milliseconds per frame, and gives the same bytes for the same scene in every process
of a machine. It needs the package mujoco and one of the system libraries EGL and OSMesa. ``mitsuba`` needs no system
library, is slower by far, and promises no equal bytes.
"""

import ctypes.util
import importlib
import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from objdyn.clevrer import HEIGHT, WIDTH, Camera, look_at

RGB = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "cyan": (41, 208, 208),
    "purple": (129, 38, 192),
    "yellow": (255, 238, 51),
}
"""CLEVR's colours."""
MAX_SOLIDS = 254
"""A mask has a byte per pixel, and 0 is the floor."""

_SAMPLES = 16
_SHADOW_MAP = (256, 1024)  # pixels for small and for large pictures; what drawing with MuJoCo costs is mostly these
_METAL_SHADE = 0.7  # darker, since highlights come on top
_GEOMS = {"cube": "mjGEOM_BOX", "sphere": "mjGEOM_SPHERE", "cylinder": "mjGEOM_CYLINDER"}
_LIBRARIES = {"egl": ("EGL", "libegl1 (and libgl1-mesa-dri where there is no GPU)"), "osmesa": ("OSMesa", "libosmesa6")}
_FALLBACK = (
    "or draw without them, slower and at 128 pixels, with renderer=mitsuba (pip install 'objdyn[sim3d-mitsuba]')"
)
_SCENERY = """
<mujoco>
  <statistic center="0 0 0" extent="5"/>
  <visual>
    <global offwidth="{width}" offheight="{height}"/>
    <quality shadowsize="{shadows}" offsamples="4" numslices="32" numstacks="24"/>
    <map znear="0.01" zfar="20" shadowclip="1"/>
    <headlight ambient="0.36 0.36 0.36" diffuse="0 0 0" specular="0 0 0"/>
  </visual>
  <asset><material name="floor" rgba="0.62 0.62 0.625 1" specular="0" shininess="0" reflectance="0"/></asset>
  <worldbody>
    <light directional="true" pos="-2 -4 6" dir="0.3 0.5 -1" diffuse="0.17 0.17 0.17" specular="0.5 0.5 0.5"/>
    <light directional="true" pos="5 2 6" dir="-0.8 -0.2 -1" diffuse="0.15 0.15 0.15" specular="0.5 0.5 0.5"/>
    <light pos="4.5 -4 5" dir="-0.6 0.55 -0.65" cutoff="85" exponent="1" castshadow="false"
           diffuse="0.5 0.5 0.5" specular="0.7 0.7 0.7"/>
    <geom type="plane" size="40 40 1" material="floor"/>
  </worldbody>
</mujoco>
"""


class Solid(NamedTuple):
    """Something to draw."""

    shape: str
    """``cube``, ``sphere`` or ``cylinder``."""
    color: str
    """One of ``RGB``."""
    material: str
    """``metal`` (shiny) or ``rubber`` (matt)."""
    half: float
    """Half the edge, the radius, or the radius and half the height."""
    position: Float[np.ndarray, "3"]
    """Of the centre; the floor is z = 0."""
    rotation: Float[np.ndarray, "3 3"]
    """From the solid's axes to the world's."""


class Picture(NamedTuple):
    """What the camera sees."""

    frame: UInt8[np.ndarray, "h w 3"]
    mask: UInt8[np.ndarray, "h w"]
    """0 for the floor; solid i is i + 1."""


@dataclass(frozen=True)
class View:
    """Where the picture is taken from, and its size.

    Raises:
        ValueError: an angle or a size is impossible.
    """

    position: tuple[float, float, float]
    """Of the pinhole."""
    target: tuple[float, float, float]
    """In the middle of the picture."""
    fov_y: float
    """Angle from the upper to the lower edge, in degrees."""
    width: int = WIDTH
    """In pixels."""
    height: int = HEIGHT
    """In pixels."""
    aspect: float = WIDTH / HEIGHT
    """Width over height of what is seen; if that is not the ratio of the pixels, the picture is squeezed."""

    def __post_init__(self) -> None:
        if not (0 < self.fov_y < 180 and self.aspect > 0 and 1 <= self.width <= 4096 and 1 <= self.height <= 4096):
            raise ValueError(
                "a view needs an angle between 0 and 180 degrees, a positive aspect and 1 to 4096 pixels a side, got "
                f"fov_y={self.fov_y:g}, aspect={self.aspect:g}, {self.width}x{self.height}"
            )

    @cached_property
    def camera(self) -> Camera:
        """How points of the world get into the picture."""
        plain = look_at(self.position, self.target, self.fov_y, self.width, self.height)
        matrix = plain.matrix.copy()
        # Around the middle, which does not move: u/w - width/2 is squeezed.
        squeeze = self.width / (self.aspect * self.height)
        matrix[0] = squeeze * matrix[0] + (1 - squeeze) * self.width / 2 * matrix[2]
        return Camera(matrix, self.width, self.height)

    @property
    def axes(self) -> Float[np.ndarray, "3 3"]:
        """Unit vectors to the right, up and forward, in the world."""
        forward = np.subtract(self.target, self.position).astype(np.float64)
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        return np.stack([right, np.cross(right, forward), forward])


class Renderer(Protocol):
    """Draws pictures of one view."""

    def draw(self, solids: Sequence[Solid]) -> Picture:
        """Draw solids on the floor."""
        ...


class MujocoRenderer:
    """Draws with MuJoCo's OpenGL renderer, in the thread that made it.

    Metal has highlights and no mirror images. Solids are handed over for each frame, so one context serves all videos.

    Raises:
        ValueError: mujoco is not installed, or there is no OpenGL to draw with; the message says what to install.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._gl, self._mujoco = _context(view)
        mujoco = self._mujoco
        scenery = _SCENERY.format(width=view.width, height=view.height, shadows=_SHADOW_MAP[view.height > 128])
        model = mujoco.MjModel.from_xml_string(scenery)
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = scene = mujoco.MjvScene(model, maxgeom=MAX_SOLIDS + 1)
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, mujoco.MjvCamera(), everything, scene)
        scene.geoms[0].segid = -1  # the floor is the background
        _, up, forward = view.axes
        for camera in scene.camera:
            camera.pos, camera.up, camera.forward = view.position, up, forward
            top = camera.frustum_near * math.tan(math.radians(view.fov_y) / 2)
            camera.frustum_top, camera.frustum_bottom = top, -top
            camera.frustum_center, camera.frustum_width = 0, top * view.aspect
        self._rectangle = mujoco.MjrRect(0, 0, view.width, view.height)

    def draw(self, solids: Sequence[Solid]) -> Picture:
        """Draw solids on the floor.

        Raises:
            ValueError: there are more than ``MAX_SOLIDS``.
        """
        _check_number(solids)
        mujoco, scene = self._mujoco, self._scene
        self._gl.make_current()
        for i, solid in enumerate(solids):
            geom = scene.geoms[1 + i]
            kind = getattr(mujoco.mjtGeom, _GEOMS[solid.shape])
            metal = solid.material == "metal"
            color = np.array([*(_METAL_SHADE * v if metal else v for v in RGB[solid.color]), 255], np.float32) / 255
            mujoco.mjv_initGeom(geom, kind, np.full(3, solid.half), solid.position, solid.rotation.ravel(), color)
            geom.specular, geom.shininess = (1.0, 0.25) if metal else (0.05, 0.1)
            geom.category, geom.segid = mujoco.mjtCatBit.mjCAT_DYNAMIC, i
        scene.ngeom = 1 + len(solids)
        frame = self._read()
        flags = [int(mujoco.mjtRndFlag.mjRND_SEGMENT), int(mujoco.mjtRndFlag.mjRND_IDCOLOR)]
        scene.flags[flags] = 1
        try:
            mask = self._read()[..., 0]  # the number of a solid, plus 1, is its colour, red first
        finally:
            scene.flags[flags] = 0
        return Picture(frame, np.ascontiguousarray(mask))

    def _read(self) -> np.ndarray:
        pixels = np.empty((self._view.height, self._view.width, 3), np.uint8)
        self._mujoco.mjr_render(self._rectangle, self._scene, self._context)
        self._mujoco.mjr_readPixels(pixels, None, self._rectangle, self._context)
        return np.ascontiguousarray(pixels[::-1])


class MitsubaRenderer:
    """Draws with Mitsuba's path tracer, which needs no system package: about 0.3 s per frame of 128 pixels.

    Metal mirrors its surroundings, shadows are soft, and ``_SAMPLES`` rays per pixel leave some grain. Frames are the
    same from run to run up to rounding, so now and then a pixel differs by a level.

    Raises:
        ValueError: mitsuba is not installed.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._mitsuba = mitsuba = import_extra("mitsuba", "sim3d-mitsuba")
        mitsuba.set_variant("scalar_rgb")
        place, rectangle = mitsuba.ScalarTransform4f(), {"type": "rectangle"}
        film = {"type": "hdrfilm", "width": self._width, "height": view.height, "rfilter": {"type": "box"}}
        sensor = {
            "type": "perspective",
            "fov": view.fov_y,
            "fov_axis": "y",
            "to_world": place.look_at(origin=view.position, target=view.target, up=[0, 0, 1]),
            "film": film,
        }
        lamp = place.look_at(origin=[-2, -4, 6], target=[0, 0, 0], up=[0, 0, 1]).scale([1.5, 1.5, 1])
        self._scenery = {
            "type": "scene",
            "floor": {**rectangle, "to_world": place.scale([40, 40, 1]), "bsdf": self._paint((140, 140, 141), False)},
            "sky": {"type": "constant", "radiance": 0.55},
            "lamp": {**rectangle, "to_world": lamp, "emitter": {"type": "area", "radiance": 9.0}},
        }
        self._sensor = mitsuba.load_dict(sensor)
        self._path = mitsuba.load_dict({"type": "path", "max_depth": 4})
        self._index = mitsuba.load_dict({"type": "aov", "aovs": "which:shape_index"})

    @property
    def _width(self) -> int:
        """Pixels are square while it draws."""
        return round(self._view.aspect * self._view.height)

    def draw(self, solids: Sequence[Solid]) -> Picture:
        """Draw solids on the floor.

        Raises:
            ValueError: there are more than ``MAX_SOLIDS``.
        """
        _check_number(solids)
        mitsuba, view = self._mitsuba, self._view
        parts = {f"{i}_{name}": part for i, solid in enumerate(solids) for name, part in self._parts(solid)}
        scene = mitsuba.load_dict(self._scenery | parts)
        drawn = mitsuba.render(scene, sensor=self._sensor, integrator=self._path, spp=_SAMPLES, seed=0)
        frame = np.array(mitsuba.Bitmap(drawn).convert(mitsuba.Bitmap.PixelFormat.RGB, mitsuba.Struct.Type.UInt8, True))
        # One ray per pixel and no average: numbers of shapes have no meaning between them.
        which = np.array(mitsuba.render(scene, sensor=self._sensor, integrator=self._index, spp=1, seed=0))[..., 0]
        owners = [shape.id().partition("_")[0] for shape in scene.shapes()]
        # Mitsuba counts shapes from 1; 0 is where a ray meets none.
        number = np.array([0, *(int(owner) + 1 if owner.isdecimal() else 0 for owner in owners)], np.uint8)
        mask = number[np.rint(which).astype(np.int64)]
        if self._width != view.width:
            from PIL import Image

            size = (view.width, view.height)
            frame = np.array(Image.fromarray(frame).resize(size, Image.Resampling.BOX))
            mask = np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        return Picture(frame, mask)

    def _parts(self, solid: Solid) -> Iterator[tuple[str, dict[str, Any]]]:
        rigid = np.eye(4)
        rigid[:3, :3], rigid[:3, 3] = solid.rotation * solid.half, solid.position
        place, paint = self._mitsuba.ScalarTransform4f(rigid), self._paint(RGB[solid.color], solid.material == "metal")
        if solid.shape != "cylinder":
            yield solid.shape, {"type": solid.shape, "to_world": place, "bsdf": paint}
            return
        # Mitsuba's cylinder is a tube, and a disc is seen from one side only.
        yield "tube", {"type": "cylinder", "p0": [0, 0, -1], "p1": [0, 0, 1], "to_world": place, "bsdf": paint}
        top = place.translate([0, 0, 1])
        yield "top", {"type": "disk", "to_world": top, "bsdf": paint}
        bottom = place.rotate([1, 0, 0], 180).translate([0, 0, 1])
        yield "bottom", {"type": "disk", "to_world": bottom, "bsdf": paint}

    @staticmethod
    def _paint(color: tuple[int, int, int], metal: bool) -> dict[str, Any]:
        linear = (np.array(color) / 255) ** 2.2
        return {
            "type": "principled",
            "base_color": {"type": "rgb", "value": linear.tolist()},
            "metallic": 1.0 if metal else 0.0,
            "roughness": 0.2 if metal else 0.7,
        }


RENDERERS = {"mujoco": MujocoRenderer, "mitsuba": MitsubaRenderer}
"""By the name that options give."""

_made = threading.local()


def renderer(name: str, view: View) -> Renderer:
    """Return this thread's renderer of a view; it is made once.

    Raises:
        ValueError: there is no such renderer, or it lacks what it draws with.
    """
    if name not in RENDERERS:
        raise ValueError(f"renderer must be one of {', '.join(RENDERERS)}, got {name!r}")
    made: dict[tuple[str, View], Renderer] = _made.__dict__.setdefault("by_view", {})
    if (name, view) not in made:
        made[name, view] = RENDERERS[name](view)
    return made[name, view]


def import_extra(module: str, extra: str) -> Any:
    """Import a package that only an extra of this project brings.

    Raises:
        ValueError: it is not installed.
    """
    if module == "mujoco":
        # Read once, when the package is imported; its own choice needs a screen.
        os.environ.setdefault("MUJOCO_GL", _library())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ValueError(f"the package {module} is not installed; pip install 'objdyn[{extra}]'") from error


def _check_number(solids: Sequence[Solid]) -> None:
    if len(solids) > MAX_SOLIDS:
        raise ValueError(f"a picture has room for {MAX_SOLIDS} solids, got {len(solids)}")


def _library() -> str:
    """Which of the two libraries there is, EGL first; ``egl`` if there is none."""
    return next((name for name, (library, _) in _LIBRARIES.items() if ctypes.util.find_library(library)), "egl")


def _context(view: View) -> tuple[Any, Any]:
    """An OpenGL context of this thread, and the package mujoco."""
    mujoco = import_extra("mujoco", "sim3d")
    chosen = os.environ["MUJOCO_GL"].strip().lower()
    chosen = chosen if chosen in _LIBRARIES else _library()
    try:
        return importlib.import_module(f"mujoco.{chosen}").GLContext(view.width, view.height), mujoco
    except Exception as error:  # what is missing shows as an import, attribute, runtime or OpenGL error
        packages = " or ".join(package for _, package in _LIBRARIES.values())
        raise ValueError(
            f"MuJoCo cannot draw here: MUJOCO_GL={chosen} gave {type(error).__name__}: {error}; install the system "
            f"package {packages}, {_FALLBACK}"
        ) from error
