"""Contact sheets: rows of images with labels, for demos, training samples and reports."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, FAINT, HIGHLIGHT = (32, 32, 32), (222, 222, 222), (214, 120, 20)
MARGIN, GAP, TEXT = 16, 10, 13


@dataclass(frozen=True)
class SheetCell:
    """An image with a caption below it; is_input=True frames it as an input rather than a result."""

    image: Image.Image
    caption: str = ""
    is_input: bool = False


def contact_sheet(
    rows: Sequence[Sequence[SheetCell | Image.Image | None]],
    labels: Sequence[str],
    *,
    title: str = "",
    cell: int = 128,
    label_width: int = 150,
) -> Image.Image:
    """Rows of cells with a label left of each row; None leaves a cell empty. Images are scaled to fit `cell` pixels.
    ValueError unless there is a row, and one label for each."""
    if len(labels) != len(rows) or not rows:
        raise ValueError(
            f"a sheet needs one label a row and at least one row; found {len(labels)} for {len(rows)} rows"
        )
    grid = [[SheetCell(item) if isinstance(item, Image.Image) else item for item in row] for row in rows]
    font, bold = ImageFont.load_default(TEXT), ImageFont.load_default(TEXT + 7)
    line = TEXT + 4
    heights = [cell + GAP + (line if any(item and item.caption for item in row) else 0) for row in grid]
    top = MARGIN + (TEXT + 7 + 2 * GAP if title else 0)
    width = 2 * MARGIN + label_width + max(len(row) for row in grid) * (cell + GAP) - GAP
    sheet = Image.new("RGB", (width, top + sum(heights) + MARGIN - GAP), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, MARGIN), _cut(draw, title, bold, width - 2 * MARGIN), INK, font=bold)
    y = top
    for row, label, height in zip(grid, labels, heights, strict=True):
        for index, text in enumerate(_wrap(draw, label, font, label_width - GAP, cell // line)):
            draw.text((MARGIN, y + index * line), text, INK, font=font)
        for column, item in enumerate(row):
            if item is not None:
                _paste(draw, sheet, item, (MARGIN + label_width + column * (cell + GAP), y), cell, font)
        y += height
    return sheet


def _paste(
    draw: ImageDraw.ImageDraw, sheet: Image.Image, item: SheetCell, corner: tuple[int, int], cell: int, font: Font
) -> None:
    x, y = corner
    scale = cell / max(item.image.size)
    size = (max(1, round(item.image.width * scale)), max(1, round(item.image.height * scale)))
    picture = item.image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    sheet.paste(picture, (x + (cell - size[0]) // 2, y + (cell - size[1]) // 2))
    outline, ink, width = (HIGHLIGHT, HIGHLIGHT, 2) if item.is_input else (FAINT, INK, 1)
    draw.rectangle((x - 1, y - 1, x + cell, y + cell), outline=outline, width=width)
    draw.text((x + cell / 2, y + cell + 3), _cut(draw, item.caption, font, cell), ink, font=font, anchor="ma")


def _cut(draw: ImageDraw.ImageDraw, text: str, font: Font, width: float) -> str:
    """The text, or as much of it as fits with an ellipsis."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: Font, width: float, limit: int) -> list[str]:
    """At most `limit` lines of whole words that fit the width; a longer word is cut."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        current = ""
        for word in paragraph.split():
            longer = f"{current} {word}".strip()
            if current and draw.textlength(longer, font=font) > width:
                lines.append(current)
                current = word
            else:
                current = longer
        lines.append(current)
    return [_cut(draw, line, font, width) for line in lines[: max(limit, 1)]]
