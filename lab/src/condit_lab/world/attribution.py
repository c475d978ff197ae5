"""Who drew the icons of the larger world, and what their licences ask to be said."""

from __future__ import annotations

from collections.abc import Iterable

from condit_lab.icons.attribution import LICENCE_LINKS, MIT_TEXT, SOURCES
from condit_lab.icons.styles import STYLES as EMOJI_STYLES
from condit_lab.world import clipart
from condit_lab.world.sets import icon_sets, looks
from condit_lab.world.store import StyleRow

LINKS = LICENCE_LINKS | {
    "ISC": "https://opensource.org/license/isc-license-txt",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "public-domain": "https://creativecommons.org/publicdomain/mark/1.0/",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
}
ISC_TEXT = """\
Permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby granted,
provided that the above copyright notice and this permission notice appear in all copies.

THE SOFTWARE IS PROVIDED "AS IS" AND THE AUTHOR DISCLAIMS ALL WARRANTIES WITH REGARD TO THIS SOFTWARE INCLUDING ALL
IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS. IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR ANY SPECIAL, DIRECT,
INDIRECT, OR CONSEQUENTIAL DAMAGES OR ANY DAMAGES WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN AN
ACTION OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF OR IN CONNECTION WITH THE USE OR PERFORMANCE OF
THIS SOFTWARE.
"""


def attribution(styles: Iterable[StyleRow]) -> str:
    """The notice that the licences ask for, as Markdown: one row a package."""
    keys = [style.key for style in styles]
    rows: dict[str, tuple[str, str, str, str]] = {}
    for key in keys:
        if key in EMOJI_STYLES:
            style = EMOJI_STYLES[key]
            rows[style.package] = (style.version, style.author, SOURCES[style.family], style.licence)
    for look in looks():
        if look.key in keys and look.icon_set == clipart.SOURCE:
            author = "the authors named in each file of the package"
            rows[clipart.DEB] = (clipart.DEB_VERSION, author, clipart.URL, clipart.LICENCE)
        elif look.key in keys and look.icon_set in icon_sets():
            entry = icon_sets()[look.icon_set]
            rows[entry.package.name] = (entry.package.version, entry.author, entry.url, entry.licence)
    lines = [
        "# The drawings and who made them",
        "",
        "All sets were rasterised and rescaled; the style `inflated` shades silhouettes of `ph-fill`.",
        "Labels and tags of emoji concepts: emojibase-data, Miles Johnson, MIT.",
        "",
        "| package | author and source | licence |",
        "|---|---|---|",
    ]
    for package, (version, author, url, licence) in rows.items():
        source = f"[{author}]({url})" if url else author
        lines.append(f"| {package} {version} | {source} | [{licence}]({LINKS.get(licence, url)}) |")
    for licence, title, text in (("MIT", "MIT License", MIT_TEXT), ("ISC", "ISC License", ISC_TEXT)):
        holders = sorted({author for _, author, _, name in rows.values() if name == licence})
        if licence == "MIT":
            holders = sorted({*holders, "2017-2019 Miles Johnson"})
        if holders:
            lines += ["", f"## {title}", "", *(f"Copyright (c) {holder}  " for holder in holders), "", text]
    return "\n".join(lines)
