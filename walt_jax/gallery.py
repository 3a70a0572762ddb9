"""A page of videos and pictures to look at."""

import dataclasses
import html
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #222; background: #fafafa; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.items { display: flex; flex-wrap: wrap; gap: 12px; }
figure { margin: 0; } figcaption { font-size: 12px; color: #555; max-width: 100%; }
video { height: 128px; background: #000; image-rendering: pixelated; display: block; }
img { max-width: 100%; image-rendering: auto; }
.thumbnails img { height: 128px; } .thumbnails figure { width: min-content; }
table { border-collapse: collapse; } td, th { padding: 2px 12px 2px 0; text-align: left; }
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with files under it.

    Attributes:
      title: heading; text: a sentence under it.
      items: (file relative to the page, caption); `.mp4` plays, anything else is a picture.
      table: rows of cells, the first row the header.
      thumbnails: show the pictures small.
    """

    title: str
    text: str = ""
    items: Sequence[tuple[str, str]] = ()
    table: Sequence[Sequence[str]] = ()
    thumbnails: bool = False


def write_gallery(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Writes one HTML page without scripts; its files stay where they are."""
    body = "\n".join(_section(s) for s in sections)
    Path(path).write_text(
        f"<!doctype html>\n<html lang='en'><meta charset='utf-8'>\n"
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n<h1>{html.escape(title)}</h1>\n{body}\n</html>\n",
        encoding="utf-8",
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    if section.table:
        rows = []
        for i, row in enumerate(section.table):
            cell = "td" if i else "th"
            rows.append("<tr>" + "".join(f"<{cell}>{html.escape(c)}</{cell}>" for c in row))
        parts.append("<table>" + "\n".join(rows) + "</table>")
    if section.items:
        figures = "\n".join(_figure(*item) for item in section.items)
        small = " thumbnails" if section.thumbnails else ""
        parts.append(f"<div class='items{small}'>\n{figures}\n</div>")
    return "\n".join(parts)


def _figure(file: str, caption: str) -> str:
    source = html.escape(urllib.parse.quote(file), quote=True)
    if file.endswith(".mp4"):
        media = f"<video src='{source}' autoplay loop muted playsinline></video>"
    else:
        media = f"<img src='{source}' alt='{html.escape(caption, quote=True)}'>"
    return f"<figure>{media}<figcaption>{html.escape(caption)}</figcaption></figure>"
