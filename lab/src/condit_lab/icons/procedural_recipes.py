"""Recipes of procedural icon styles: which lines, fills, grounds and words go together."""

from __future__ import annotations

from math import pi
from random import Random

from condit_lab.icons.procedural import RGB, Effect, Grade, Procedural

# (English, Chinese, colour)
HUES: tuple[tuple[str, str, RGB], ...] = (
    ("red", "红色", (214, 45, 50)),
    ("orange", "橙色", (236, 120, 30)),
    ("yellow", "黄色", (240, 190, 30)),
    ("green", "绿色", (60, 160, 75)),
    ("teal", "青色", (20, 150, 150)),
    ("blue", "蓝色", (45, 105, 220)),
    ("purple", "紫色", (125, 70, 200)),
    ("pink", "粉色", (232, 90, 150)),
    ("brown", "棕色", (130, 80, 45)),
)
_BLACK, _WHITE = ("black", "黑色", (24, 22, 28)), ("white", "白色", (255, 255, 255))


def _cartoon(rng: Random) -> Procedural:
    name, name_zh, ink = _BLACK if rng.random() < 0.4 else _pick(rng, dark=True)
    kind, kind_zh, grade = rng.choice(_FILLS)
    background, ground = _light_ground(rng)
    width = rng.choice((1.4, 2.0, 2.8, 3.8))
    thick, thick_zh = ("thick ", "粗") if width > 2.5 else ("", "")
    return Procedural(
        f"{thick}{name} outline, {kind}{ground[0]}",
        f"{thick_zh}{name_zh}描边，{kind_zh}{ground[1]}",
        fill="keep",
        grade=grade,
        line=ink,
        width=width,
        background=background,
    )


def _duotone(rng: Random) -> Procedural:
    dark, light = (_named(rng, hue) for hue in rng.sample(HUES, 2))
    stops = (_mix(dark[2], (0, 0, 0), 0.45), _mix(light[2], (255, 255, 255), 0.5))
    negative = rng.random() < 0.25
    levels = rng.choice((0, 3, 4))
    background, ground = _light_ground(rng)
    if rng.random() < 0.3:
        background, ground = (_mix(stops[1], (255, 255, 255), 0.6),), ("", "")
    return Procedural(
        f"{dark[0]} and {light[0]} duotone{ground[0]}",
        f"{dark[1]}与{light[1]}双色调{ground[1]}",
        "tones",
        stops[::-1] if negative else stops,
        line=stops[0] if rng.random() < 0.5 else None,
        width=rng.choice((1.5, 2.2)),
        background=background,
        grade=Grade(levels=levels),
    )


def _poster(rng: Random) -> Procedural:
    picked = rng.sample(HUES, 3)
    ink, paper = (26, 24, 34), _mix(picked[0][2], (255, 255, 255), 0.82)
    colours = (ink, *(_jitter(rng, hue[2]) for hue in picked), paper)
    outlined = rng.random() < 0.5
    names = " and ".join(hue[0] for hue in picked[:2])
    return Procedural(
        f"{names} retro poster" + (", dark outline" if outlined else ""),
        f"{picked[0][1]}和{picked[1][1]}的复古海报" + ("，深色描边" if outlined else ""),
        "palette",
        colours,
        line=ink if outlined else None,
        width=rng.choice((1.5, 2.2, 3.0)),
        background=(paper,),
    )


def _lines(rng: Random) -> Procedural:
    on_dark = rng.random() < 0.4
    name, name_zh, ink = _pick(rng, dark=not on_dark)
    width = rng.choice((1.2, 1.8, 2.6))
    if not on_dark:
        background, ground = _light_ground(rng)
        white = rng.random() < 0.3
        return Procedural(
            f"{name} line drawing{ground[0]}",
            f"{name_zh}线稿{ground[1]}",
            "solid" if white and ground[0] else "none",
            ((255, 255, 255),),
            line=ink,
            width=width,
            background=background,
        )
    glow = rng.random() < 0.5
    bright = _mix(ink, (255, 255, 255), 0.35 if glow else 0.15)
    ground_name, ground_zh, ground_rgb = rng.choice((_BLACK, HUES[5], HUES[6], HUES[4]))
    shade, shade_zh = ("", "") if ground_name == "black" else ("dark ", "深")
    if not glow and rng.random() < 0.5:
        name, name_zh, bright = "white", "白色", (250, 250, 250)
    return Procedural(
        f"{name} {'neon glow' if glow else 'chalk'} lines on {shade}{ground_name}",
        f"{shade_zh}{ground_zh}底{name_zh}{'霓虹发光' if glow else '粉笔'}线条",
        "none",
        line=bright,
        width=width,
        background=(_mix(ground_rgb, (8, 8, 20), 0.72),),
        effect="glow" if glow else "none",
    )


def _silhouette(rng: Random) -> Procedural:
    name, name_zh, ink = _BLACK if rng.random() < 0.2 else _pick(rng, dark=True)
    gradient = rng.random() < 0.4 and name != "black"
    other = _named(rng, rng.choice([hue for hue in HUES if hue[0] != name]))
    look, look_zh = f"{name} silhouette", f"{name_zh}剪影"
    if gradient:
        look, look_zh = f"{name} to {other[0]} gradient silhouette", f"{name_zh}到{other[1]}渐变剪影"
    colours = (ink, other[2]) if gradient else (ink,)
    placing = rng.random()
    if placing < 0.3:
        badge = (255, 255, 255) if gradient else _jitter(rng, ink)
        colours = colours if gradient else ((255, 255, 255),)
        background = ((255, 255, 255),) if not gradient else (_mix(other[2], (255, 255, 255), 0.6),)
        look = f"white glyph on a {name} disc" if not gradient else f"{look} on a disc"
        look_zh = f"{name_zh}圆底白色图形" if not gradient else f"圆底{look_zh}"
        return Procedural(
            look, look_zh, "gradient" if gradient else "solid", colours, background=background, badge=badge
        )
    background, ground = _light_ground(rng)
    if placing < 0.5 and not gradient:
        background, colours = (ink,), ((255, 255, 255),)
        look, look_zh, ground = f"white silhouette on {name}", f"{name_zh}底白色剪影", ("", "")
    return Procedural(
        look + ground[0],
        look_zh + ground[1],
        "gradient" if gradient else "solid",
        colours,
        width=rng.choice((1.2, 2.0)),
        background=background,
        effect="puffy" if rng.random() < 0.25 else "none",
    )


def _night(rng: Random) -> Procedural:
    kind, kind_zh, grade = rng.choice(_FILLS)
    name, name_zh, ground = rng.choice((_BLACK, _pick(rng, dark=True)))
    line_name, line_zh, ink = rng.choice((_WHITE, _pick(rng)))
    ink = _mix(ink, (255, 255, 255), 0.35)
    return Procedural(
        f"{line_name} outline, {kind}, {'' if name == 'black' else 'dark '}{name} background",
        f"{line_zh}描边，{kind_zh}，{'' if name == 'black' else '深'}{name_zh}背景",
        fill="keep",
        grade=grade,
        line=ink,
        width=rng.choice((1.6, 2.4, 3.2)),
        inner=rng.random() < 0.5,
        background=(_mix(ground, (10, 10, 24), 0.65),),
    )


def _printed(rng: Random) -> Procedural:
    name, name_zh, ink = _BLACK if rng.random() < 0.3 else _pick(rng, dark=True)
    hatch = rng.random() < 0.5
    tint = _pick(rng)[2]
    paper = (255, 255, 255) if rng.random() < 0.5 else _mix(tint, (255, 255, 255), 0.75)
    return Procedural(
        f"{name} {'hatching' if hatch else 'halftone dots'}",
        f"{name_zh}{'排线' if hatch else '网点'}",
        "hatch" if hatch else "dots",
        (ink, (255, 255, 255)),
        line=ink,
        width=rng.choice((1.6, 2.4)),
        background=(paper,),
        period=rng.choice((4.5, 6.0, 7.5)),
    )


def _sticker(rng: Random) -> Procedural:
    kind, kind_zh, grade = rng.choice(_FILLS)
    name, name_zh, ground = _pick(rng)
    soft = _mix(ground, (255, 255, 255), rng.choice((0.15, 0.5, 0.7)))
    return Procedural(
        f"sticker with a white border on {name}, {kind}",
        f"{name_zh}底白边贴纸，{kind_zh}",
        fill="keep",
        grade=grade,
        background=(soft,),
        effect="sticker",
        scale=0.8,
    )


def _recoloured(rng: Random) -> Procedural:
    look, look_zh, grade = rng.choice(_CHANGES)
    background, ground = _light_ground(rng)
    effect, words, words_zh = rng.choice(_EFFECTS)
    return Procedural(
        f"{look}{words}{ground[0]}",
        f"{look_zh}{words_zh}{ground[1]}",
        "keep",
        grade=grade,
        background=background,
        effect=effect,
    )


def _pixelated(rng: Random) -> Procedural:
    kind, kind_zh, grade = rng.choice(_FILLS)
    background, ground = _light_ground(rng)
    outlined = rng.random() < 0.6
    return Procedural(
        f"pixel art, {kind}{ground[0]}",
        f"像素画，{kind_zh}{ground[1]}",
        fill="keep",
        grade=grade,
        line=_BLACK[2] if outlined else None,
        width=2.6,
        inner=False,
        background=background,
        effect="pixels",
    )


RECIPES = (
    (_cartoon, 4.0),
    (_duotone, 2.0),
    (_poster, 1.5),
    (_lines, 3.0),
    (_silhouette, 2.0),
    (_night, 1.5),
    (_printed, 1.5),
    (_sticker, 1.0),
    (_recoloured, 2.0),
    (_pixelated, 1.0),
)
# Words, Chinese words, and how a drawing keeps its colours.
_FILLS = (
    ("flat colors", "平涂", Grade(levels=4)),
    ("pastel fills", "柔和浅色", Grade(levels=5, saturation=1.15, pastel=0.5)),
    ("vivid fills", "鲜艳色彩", Grade(levels=4, saturation=1.6)),
    ("muted fills", "低饱和色彩", Grade(levels=4, saturation=0.45)),
    ("gray fills", "灰色填充", Grade(levels=4, saturation=0.0)),
    ("natural colors", "自然色彩", Grade()),
)
_EFFECTS: tuple[tuple[Effect, str, str], ...] = (
    ("none", "", ""),
    ("shadow", ", drop shadow", "，投影"),
    ("puffy", ", puffy shading", "，立体鼓起"),
)
_CHANGES = (
    ("grayscale", "灰度", Grade(saturation=0.0)),
    ("pastel", "粉彩", Grade(saturation=1.2, pastel=0.5)),
    ("vivid", "鲜艳", Grade(saturation=1.8)),
    ("inverted colors", "反色", Grade(negative=True)),
    ("colors turned a third", "色相旋转三分之一", Grade(hue=2 * pi / 3)),
    ("colors turned two thirds", "色相旋转三分之二", Grade(hue=-2 * pi / 3)),
    ("complementary colors", "互补色", Grade(hue=pi)),
    ("faded print", "褪色印刷", Grade(levels=5, saturation=0.5, pastel=0.25)),
)


def _pick(rng: Random, dark: bool = False) -> tuple[str, str, RGB]:
    """A named hue, a little off its table colour; dark leaves out those too light for lines on white."""
    return _named(rng, rng.choice([hue for hue in HUES if not dark or hue[0] != "yellow"]))


def _named(rng: Random, hue: tuple[str, str, RGB]) -> tuple[str, str, RGB]:
    return hue[0], hue[1], _jitter(rng, hue[2])


def _light_ground(rng: Random) -> tuple[tuple[RGB, ...], tuple[str, str]]:
    """A background that dark lines can stand on, and the words for it: white half of the time."""
    draw = rng.random()
    if draw < 0.5:
        return ((255, 255, 255),), ("", "")
    name, name_zh, rgb = _pick(rng)
    if draw < 0.9:
        return (_mix(rgb, (255, 255, 255), rng.uniform(0.6, 0.85)),), (
            f", light {name} background",
            f"，浅{name_zh}背景",
        )
    ends = (_mix(rgb, (255, 255, 255), 0.85), _mix(rgb, (255, 255, 255), 0.4))
    return ends, (f", {name} gradient background", f"，{name_zh}渐变背景")


def _jitter(rng: Random, rgb: RGB, by: int = 16) -> RGB:
    red, green, blue = (min(255, max(0, channel + rng.randint(-by, by))) for channel in rgb)
    return red, green, blue


def _mix(rgb: RGB, other: RGB, share: float) -> RGB:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(rgb, other, strict=True))
    return red, green, blue
