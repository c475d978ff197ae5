"""The drawing styles of the icon world: package, version, file hash, licence, author, family and names of each.

`descriptions` are (English, Chinese) phrases that a caption may use in place of the style's name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """One vendor's set. sha256 is that of the npm tarball, licence an SPDX name, family the vendor whose shapes it
    shares: sets of one family show the same drawing, so they are held out together."""

    key: str
    package: str
    version: str
    sha256: str
    licence: str
    author: str
    family: str
    name_en: str
    name_zh: str
    descriptions: tuple[tuple[str, str], ...]


_GOOGLE, _MICROSOFT, _MOZILLA = "Google", "Microsoft Corporation", "Mozilla"
_EMOJITWO, _OPENMOJI = "Emoji One and the EmojiTwo contributors", "OpenMoji, HfG Schwäbisch Gmünd"

_ROWS = (
    Style(
        "noto",
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        _GOOGLE,
        "noto",
        "noto",
        "noto",
        (("shaded cartoon", "带渐变的卡通画"), ("soft shaded emoji", "柔和的表情符号"), ("android emoji", "安卓表情")),
    ),
    Style(
        "noto-v1",
        "@iconify-json/noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        _GOOGLE,
        "noto-v1",
        "noto blob",
        "noto 圆团",
        (("old android cartoon", "旧版安卓卡通"), ("soft rounded cartoon", "圆润的卡通画")),
    ),
    Style(
        "fluent-emoji",
        "@iconify-json/fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "MIT",
        _MICROSOFT,
        "fluent",
        "fluent gradient",
        "fluent 渐变",
        (("glossy gradient drawing", "光泽渐变画"), ("smooth gradients", "平滑的渐变色")),
    ),
    Style(
        "fluent-emoji-flat",
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        _MICROSOFT,
        "fluent",
        "fluent flat",
        "fluent 扁平",
        (("flat colors without outlines", "无描边的扁平色块"), ("flat design", "扁平化设计")),
    ),
    Style(
        "fluent-emoji-high-contrast",
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
        "MIT",
        _MICROSOFT,
        "fluent",
        "fluent high contrast",
        "fluent 高对比",
        (("black and white stencil", "黑白镂空图"), ("bold black glyph", "粗黑图形"), ("linocut", "黑白版画")),
    ),
    Style(
        "fluent-emoji-3d",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
        _MICROSOFT,
        "fluent",
        "fluent 3d",
        "fluent 立体",
        (("3D rendered clay", "三维黏土渲染"), ("3D render", "三维渲染"), ("plastic toy", "塑料玩具质感")),
    ),
    Style(
        "fxemoji",
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
        _MOZILLA,
        "fxemoji",
        "firefox",
        "firefox",
        (("playful flat cartoon", "俏皮的扁平卡通"), ("flat geometric cartoon", "几何扁平卡通")),
    ),
    Style(
        "noto-mono",
        "@fontsource/noto-emoji",
        "5.3.2",
        "1fe49bb2cf7c2d78f93c0a69b6a431dcfd0d585b7831eba87fae6888ccf8d373",
        "OFL-1.1",
        _GOOGLE,
        "noto",
        "noto monochrome",
        "noto 单色",
        (("thin black line art", "黑色细线画"), ("monochrome line icon", "单色线条图标")),
    ),
    Style(
        "twemoji",
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twitter and the jdecked/twemoji contributors",
        "twemoji",
        "twemoji",
        "twemoji",
        (("simple flat emoji", "简洁的扁平表情"), ("flat colors, no outline", "无轮廓的平涂")),
    ),
    Style(
        "emojione",
        "@iconify-json/emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        _EMOJITWO,
        "emojione",
        "emojione",
        "emojione",
        (("bright flat cartoon", "明亮的扁平卡通"), ("clean flat cartoon", "干净的扁平卡通")),
    ),
    Style(
        "emojione-monotone",
        "@iconify-json/emojione-monotone",
        "1.2.1",
        "40b90004bafb406b59266155ef9b7e1dd67bf2947fc8db8d07388776f4d0d04e",
        "CC-BY-4.0",
        _EMOJITWO,
        "emojione",
        "emojione monochrome",
        "emojione 单色",
        (("solid black pictogram", "实心黑色图标"), ("black silhouette icon", "黑色剪影图标")),
    ),
    Style(
        "streamline-emojis",
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc",
        "CC-BY-4.0",
        "Streamline",
        "streamline",
        "streamline",
        "streamline",
        (("outlined cartoon with a ground shadow", "带投影的描边卡通"), ("dark outline, flat colors", "深色描边平涂")),
    ),
    Style(
        "openmoji",
        "@iconify-json/openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        "CC-BY-SA-4.0",
        _OPENMOJI,
        "openmoji",
        "openmoji color",
        "openmoji 彩色",
        (("black outline with flat colors", "黑色描边配平涂"), ("comic outline", "漫画描边")),
    ),
    Style(
        "openmoji-black",
        "openmoji",
        "17.0.0",
        "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
        "CC-BY-SA-4.0",
        _OPENMOJI,
        "openmoji",
        "openmoji outline",
        "openmoji 线稿",
        (("black line drawing", "黑色线稿"), ("simple ink outline", "简单的墨线")),
    ),
    Style(
        "emojione-v1",
        "@iconify-json/emojione-v1",
        "1.2.3",
        "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        "CC-BY-SA-4.0",
        "Emoji One 1.5",
        "emojione-v1",
        "emojione classic",
        "emojione 经典",
        (("glossy old web icon", "旧式网页图标"), ("shaded cartoon with thin outline", "细描边卡通")),
    ),
)

STYLES: dict[str, Style] = {style.key: style for style in _ROWS}


def _ui(
    set_key: str, variants: dict[str, tuple[str, str, str, str]], package: tuple[str, str, str, str]
) -> dict[str, Style]:
    """Weights of one UI icon set as styles; variants: suffix -> (name, Chinese name, description, Chinese one)."""
    version, sha256, licence, author = package
    named = "phosphor" if set_key == "ph" else set_key
    return {
        f"{set_key}-{suffix}": Style(
            f"{set_key}-{suffix}",
            f"@iconify-json/{set_key}",
            version,
            sha256,
            licence,
            author,
            set_key,
            f"{named} {name}",
            f"{named} {name_zh}",
            ((words, words_zh),),
        )
        for suffix, (name, name_zh, words, words_zh) in variants.items()
    }


# Second world: UI icons in black ink. Variants keep the same geometry: exact targets for "style" = weight and fill.
UI_STYLES: dict[str, Style] = _ui(
    "ph",
    {
        "thin": ("thin", "极细", "hairline icon", "极细线图标"),
        "light": ("light", "细线", "light line icon", "细线图标"),
        "regular": ("regular", "常规", "line icon", "线条图标"),
        "bold": ("bold", "粗线", "bold line icon", "粗线图标"),
        "fill": ("fill", "实心", "solid black icon", "实心图标"),
        "duotone": ("duotone", "双色调", "line icon with a gray fill", "灰色填充的线条图标"),
    },
    ("1.2.2", "e3a582a047d9829fc7e8842c660d8065e598d1b68bb58cb68e75a1f1e5a614cc", "MIT", "Phosphor Icons"),
) | _ui(
    "solar",
    {
        "linear": ("linear", "线性", "rounded line icon", "圆角线条图标"),
        "outline": ("outline", "轮廓", "outlined icon", "轮廓图标"),
        "broken": ("broken", "断线", "broken line icon", "断续线条图标"),
        "bold": ("bold", "实心", "bold solid icon", "粗实心图标"),
        "bold-duotone": ("bold duotone", "实心双色调", "two-tone solid icon", "双色调实心图标"),
        "line-duotone": ("line duotone", "线性双色调", "two-tone line icon", "双色调线条图标"),
    },
    ("1.2.13", "9efec9045e9188c5dd5cf9de52f8ad968ffabee565026480a6c74bfe63b3bbc2", "CC-BY-4.0", "480 Design"),
)


def style_of(key: str) -> Style:
    """The style's row by key, of the emoji sets or the UI sets."""
    style = STYLES.get(key) or UI_STYLES.get(key)
    if style is None:
        raise ValueError(f"There is no icon style {key!r}. Choose from: {', '.join([*STYLES, *UI_STYLES])}.")
    return style


def family(style: str) -> str:
    """The vendor family: sets drawn over the same shapes, which must be held out together."""
    return style_of(style).family
