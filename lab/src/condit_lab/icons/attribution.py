"""Who drew the icons, and what their licences ask to be said."""

from __future__ import annotations

from collections.abc import Iterable

from condit_lab.icons.styles import style_of

LICENCE_LINKS = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "MIT": "https://opensource.org/license/mit",
    "OFL-1.1": "https://openfontlicense.org",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
}
SOURCES = {
    "noto": "https://github.com/googlefonts/noto-emoji",
    "noto-v1": "https://github.com/googlefonts/noto-emoji",
    "fluent": "https://github.com/microsoft/fluentui-emoji",
    "fxemoji": "https://github.com/mozilla/fxemoji",
    "twemoji": "https://github.com/jdecked/twemoji",
    "emojione": "https://github.com/EmojiTwo/emojitwo",
    "emojione-v1": "https://github.com/joypixels/emojione-legacy",
    "streamline": "https://github.com/webalys-hq/streamline-vectors",
    "openmoji": "https://github.com/hfg-gmuend/openmoji",
    "ph": "https://github.com/phosphor-icons/core",
    "solar": "https://www.figma.com/community/file/1166831539721848736",
}
MIT_TEXT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def attribution(styles: Iterable[str]) -> str:
    """The notice that the licences ask for, as Markdown."""
    styles = list(styles)
    lines = [
        "# The pictures and who drew them",
        "",
        "All sets were rasterised, rescaled and, where a picture is shown, composited on white; nothing else changed.",
        "Labels and tags of emoji concepts: emojibase-data, Miles Johnson, MIT.",
        "",
        "| style | package | author and source | licence |",
        "|---|---|---|---|",
    ]
    for style in map(style_of, styles):
        author = f"[{style.author}]({SOURCES[style.family]})"
        licence = f"[{style.licence}]({LICENCE_LINKS[style.licence]})"
        lines.append(f"| {style.key} | {style.package} {style.version} | {author} | {licence} |")
    holders = sorted(
        {style_of(key).author for key in styles if style_of(key).licence == "MIT"} | {"2017-2019 Miles Johnson"}
    )
    lines += ["", "## MIT License", "", *(f"Copyright (c) {holder}  " for holder in holders), "", MIT_TEXT]
    return "\n".join(lines)
