"""Formulas: TeX in Markdown, and its conversion to MathML, which browsers draw by themselves."""

import html
import re
from xml.etree import ElementTree

import mistune
from latex2mathml.converter import convert_to_element

from src import ProjectError

# GitHub's rules: no space inside the dollars; a formula may run over a line's end; $$…$$ may stand
# alone or in a line.
_TEX = r"(?:[^$\\]|\\[\s\S])+?"
_BLOCK = rf"^ {{0,3}}\$\$(?P<block_tex>{_TEX})\$\$[ \t]*(?:\n|$)"
_INLINE = (
    rf"\$\$(?P<display_tex>{_TEX})\$\$|\$`(?P<quoted_tex>[^`]+)`\$"
    rf"|\$(?![\s$])(?P<inline_tex>{_TEX})(?<!\s)\$(?!\d)"
)
_STRAY = r"\$|\\begin\{"
_SPELLINGS = (  # what latex2mathml does not know, in words that it does
    (r"\\(?:label\{[^{}]*\}|nonumber\b|notag\b)", ""),
    (r"\\tag\*?\{([^{}]*)\}", r"\\qquad\\text{(\1)}"),
    (r"\{(aligned|align|split|gather|gathered|eqnarray\*?)\}", "{align*}"),
    (r"\\(math[a-z]+)\s+([A-Za-z])", r"\\\1{\2}"),
    (r"(?<=\d)\{,\}(?=\d)", r"\\text{,}"),
    (r"\\arg\s*\\(max|min)", r"\\arg\1"),
    (r"\\operatorname\*?\{arg\s*(?:\\[,; ])?\s*\\?(max|min)\}", r"\\arg\1"),
    (r"\\operatorname\*", r"\\operatorname"),
)
_LIMITS = ("lim", "max", "min", "sup", "inf", "arg\u2009max", "arg\u2009min")


def math_plugin(md: mistune.Markdown) -> None:
    """Teach mistune the formulas of GitHub's pages; code spans and blocks keep their dollars."""

    def formula(_, match, state):
        name, tex = next(
            (name, tex) for name, tex in match.groupdict().items() if name.endswith("_tex") and tex
        )
        kind = "block_math" if name in ("block_tex", "display_tex") else "inline_math"
        state.append_token({"type": kind, "raw": tex.strip()})
        return match.end()

    def stray(_, match, state):
        raise ProjectError(
            f"{md.renderer.place}: {match[0]!r} opens no formula in {state.src.strip()[:60]!r}; "
            r"write $…$ without spaces at its ends, environments between $$ and $$, and \$ for a "
            "dollar"
        )

    md.block.register("block_math", _BLOCK, formula, before="list")
    md.block.insert_rule(md.block.block_quote_rules, "block_math", before="list")
    md.block.insert_rule(md.block.list_rules, "block_math", before="list")
    md.inline.register("inline_math", _INLINE, formula, before="codespan")
    md.inline.register("stray_math", _STRAY, stray, before="codespan")


def mathml(tex: str, display: bool) -> str:
    """Convert one formula to MathML Core.

    latex2mathml passes over what it does not know, and leaves spacing and alignment to attributes
    that MathML Core dropped; both are mended here.

    Raises:
        ValueError: The formula holds an unknown command, unbalanced braces, or `&` or a line break
            outside an environment.
    """
    bare = re.sub(r"\\.", "", tex)
    if bare.count("{") != bare.count("}"):
        raise ValueError("unbalanced braces")
    for pattern, replacement in _SPELLINGS:
        tex = re.sub(pattern, replacement, tex)
    tree = convert_to_element(tex, display="block" if display else "inline")
    for node in tree.iter():
        text = html.unescape(node.text or "")
        node.text = text = re.sub(r"\\([$%&#_{}])", r"\1", text) if node.tag == "mtext" else text
        if "\\" in text or text == "&" or node.get("linebreak"):
            raise ValueError(f"{text or 'a line break'} is not known here")
        if node.tag in ("mi", "mo") and len(text) > 1 and "".join(text.split()).isalpha():
            node.tag, node.attrib["lspace"], node.attrib["rspace"] = "mo", "0.167em", "0.167em"
        elif text in ("|", "‖", "⌊", "⌋", "⌈", "⌉") and node.get("stretchy") != "true":
            node.tag, node.attrib = "mo", {"stretchy": "false", "lspace": "0", "rspace": "0"}
        elif text == "∞":
            node.tag = "mi"
    for node in tree.iter():
        for child, following in zip(node, node[1:]):
            if child.get("rspace") and following.text == "(":
                child.set("rspace", "0")
        if node.tag == "mtable":
            flush = node.attrib.pop("columnspacing", "").startswith("0em")
            for cell in node.iter("mtd"):
                if align := cell.attrib.pop("columnalign", None):
                    # Chromium aligns a formula by the prefixed name alone.
                    style = f"text-align:{align};text-align:-webkit-{align}"
                    cell.set("style", style + ";padding-inline:0" * flush)
        elif display and node.tag == "msub" and node[0].text in _LIMITS:
            node.tag = "munder"
        elif node.tag == "msup" and node[1].text in ("′", "″", "‴"):  # fonts draw them raised
            node.tag, node[1].tag, node[1].attrib = "mrow", "mo", {"lspace": "0", "rspace": "0"}
        elif node.tag in ("mover", "munder") and node[1].text == "―":
            node.set("style", f"border-{'top' if node.tag == 'mover' else 'bottom'}:0.06em solid")
            node.tag = "mrow"
            node.remove(node[1])
    return ElementTree.tostring(tree, encoding="unicode", short_empty_elements=False)
