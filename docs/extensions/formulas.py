"""Formulas drawn by the build: they look the same everywhere, without network, fonts or scripts."""

import html

import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

ziamath.config.svg2 = False  # Else glyphs are shared by id, across the formulas of a page.

EM = 16  # pixels; sizes are written in em, so formulas grow with the text


def draw(tex: str, size: int, inline: bool) -> str:
    """Turn a formula into an SVG element that has its source as text for those who listen."""
    formula = ziamath.Latex(tex, size=size, color="currentColor", inline=inline)
    _, height = formula.getsize()
    if height > 10 * EM:
        # ziamath 0.13 stretches "|" within \left and \right without end.
        raise ValueError(rf"formula {tex} came out {height:.0f} px high. Use \Bigl for \left.")
    height += 2  # the margin that ziamath draws around
    style = (
        f"height: {height / EM:.3f}em; width: auto; vertical-align: {formula.getyofst() / EM:.3f}em"
    )
    text = html.escape(tex, quote=True)
    return formula.svg().replace(
        "<svg ", f'<svg role="img" aria-label="{text}" style="{style}" ', 1
    )


def inline(writer: HTML5Translator, node: nodes.Element) -> None:
    """Write a formula in a line of text."""
    writer.body.append(draw(node.astext(), EM, inline=True))
    raise nodes.SkipNode


def block(writer: HTML5Translator, node: nodes.Element) -> None:
    """Write a formula on its own."""
    writer.body.append(f'<div class="formula">{draw(node.astext(), 18, inline=False)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer; conf.py chooses it with html_math_renderer."""
    app.add_html_math_renderer(
        "drawn", inline_renderers=(inline, None), block_renderers=(block, None)
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
