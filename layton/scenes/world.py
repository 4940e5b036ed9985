"""What a scene is made of: shapes, colours, objects, a background, and the six tasks of GenEval.

Lengths are fractions of the image side, x to the right, y down, so a scene has no resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

Shape = Literal["circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond"]
Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]
Gradient = Literal["linear", "radial"]
Texture = Literal["plain", "stripes", "checks", "noise"]
RGB = tuple[int, int, int]

TASKS: Final[tuple[Task, ...]] = get_args(Task)
RELATIONS: Final[tuple[Relation, ...]] = get_args(Relation)


@dataclass(frozen=True, slots=True)
class ShapeInfo:
    """Words for a shape, and how far it may turn without being taken for another one.

    Attributes:
        plural: English plural.
        chinese: Chinese noun, counted with the measure word U+4E2A (ge).
        max_rotation: largest rotation from upright, in degrees. A square turned by 45 degrees would be a
            diamond and a turned plus an "x", so these stay well below that.
        symmetry: smallest rotation in degrees that maps the shape onto itself (0 for a disc).
    """

    plural: str
    chinese: str
    max_rotation: float
    symmetry: float


SHAPES: Final[dict[Shape, ShapeInfo]] = {
    "circle": ShapeInfo("circles", "圆形", 0.0, 0.0),
    "square": ShapeInfo("squares", "正方形", 15.0, 90.0),
    "triangle": ShapeInfo("triangles", "三角形", 20.0, 120.0),
    "star": ShapeInfo("stars", "五角星", 18.0, 72.0),
    "heart": ShapeInfo("hearts", "爱心", 20.0, 360.0),
    "cross": ShapeInfo("crosses", "十字", 15.0, 90.0),
    "ring": ShapeInfo("rings", "圆环", 0.0, 0.0),
    "diamond": ShapeInfo("diamonds", "菱形", 15.0, 180.0),
}

# The ten names GenEval asks for. Any two differ by at least 90 in Euclidean RGB distance.
COLOURS: Final[dict[Colour, RGB]] = {
    "red": (214, 26, 32),
    "orange": (250, 134, 4),
    "yellow": (250, 224, 28),
    "green": (24, 150, 56),
    "blue": (26, 74, 216),
    "purple": (126, 34, 168),
    "pink": (255, 118, 190),
    "brown": (112, 62, 22),
    "black": (14, 14, 16),
    "white": (252, 252, 252),
}

CHINESE_COLOURS: Final[dict[Colour, str]] = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "brown": "棕色",
    "black": "黑色",
    "white": "白色",
}

MIN_DIAMETER: Final = 0.12
MAX_DIAMETER: Final = 0.35
MAX_OBJECTS: Final = 5


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One flat shape.

    Attributes:
        shape: its form.
        colour: its colour name; the pixels have exactly ``COLOURS[colour]``.
        cx: centre, from the left edge, as a fraction of the side.
        cy: centre, from the top edge, as a fraction of the side.
        diameter: diameter of the circumscribed circle around ``(cx, cy)``, as a fraction of the side.
        rotation: degrees, counter-clockwise as seen.
    """

    shape: Shape
    colour: Colour
    cx: float
    cy: float
    diameter: float
    rotation: float


@dataclass(frozen=True, slots=True)
class Background:
    """A soft gradient with a light texture, a function of the place and not of the pixel grid.

    Attributes:
        start: RGB where the gradient begins, channels in [0, 255].
        end: RGB where it ends.
        gradient: along a direction, or outwards from a point.
        angle: direction of the gradient and of the stripes, in degrees.
        texture: kind of pattern laid over the gradient.
        amplitude: half the texture's range, in grey levels.
        frequency: periods (stripes, checks) or grid cells (noise) per side.
        seed: seeds the noise grid and the pattern's phase.
    """

    start: RGB
    end: RGB
    gradient: Gradient
    angle: float
    texture: Texture
    amplitude: float
    frequency: int
    seed: int


@dataclass(frozen=True, slots=True)
class Scene:
    """The exact ground truth of one image.

    Attributes:
        task: the GenEval task the scene is an example of.
        objects: 1 to 5 objects; later ones are painted over earlier ones. In a position scene
            ``objects[1]`` stands in ``relation`` to ``objects[0]``.
        background: what is behind them.
        seed: the seed it was drawn from.
        relation: relation of ``objects[1]`` to ``objects[0]``; None except for position scenes.
    """

    task: Task
    objects: tuple[SceneObject, ...]
    background: Background
    seed: int
    relation: Relation | None = None
