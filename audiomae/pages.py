"""Reports as single HTML files with nothing outside them: one Jinja environment, one look, pictures as data URIs."""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import DictLoader, Environment, Template

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RIGHT, WRONG, MUTED, INK = "#1a7f4b", "#b3261e", "#8a93a3", "#20242c"
DPI = 110


def template(path: Path) -> Template:
    """The template in this file. It extends `page.html.j2`: a `title`, and what follows the heading as `content`."""
    return _ENVIRONMENT.from_string(path.read_text())


def png(figure: "Figure") -> bytes:
    """A figure as PNG, the same bytes for the same figure."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=DPI, metadata={"Software": None})
    return sink.getvalue()


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


_ENVIRONMENT = Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    loader=DictLoader({"page.html.j2": Path(__file__).with_name("page.html.j2").read_text()}),
)
_ENVIRONMENT.filters["png"] = lambda data: _data_uri(data, "image/png")
_ENVIRONMENT.filters["mp3"] = lambda data: _data_uri(data, "audio/mpeg")
_ENVIRONMENT.filters["score"] = lambda value: f"{value:.3f}"
_ENVIRONMENT.filters["signed"] = lambda value: f"{value:+.3f}"
_ENVIRONMENT.filters["p"] = lambda value: "< 0.001" if value < 0.001 else f"{value:.3f}"
