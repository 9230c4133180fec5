"""What figures share: style and colours."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

STYLE = str(Path(__file__).with_name("style.mplstyle"))


class ShownFigure(Figure):
    """A figure that notebooks display by itself, without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


#: Okabe-Ito colours: told apart by colour-blind readers; markers and line styles differ as well.
COLOURS = {
    "ESU": "#D55E00",
    "EUU": "#0072B2",
    "CU": "#009E73",
    "UU": "#56B4E9",
    "RU": "#999999",
    "random": "#000000",
}

#: Colours of percentages: a square-root scale keeps about one per cent visible beside a hundred.
SHARES = PowerNorm(0.5, vmin=0, vmax=100)
