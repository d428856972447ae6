"""Formulas as MathML Core, the part of MathML that browsers draw without a script."""

import html
import re
from xml.etree import ElementTree

from latex2mathml.converter import Converter

_TEX_SPELLINGS = (  # what latex2mathml does not know, in words that it does
    (r"\{(aligned|align|split)\}", "{align*}"),
    (r"\\(math[a-z]+)\s+([A-Za-z])", r"\\\1{\2}"),
    (r"(?<=\d)\{,\}(?=\d)", r"\\text{,}"),
    (r"\\arg\s*\\(max|min)", r"\\arg\1"),
    (r"\\operatorname\*?\{arg\s*(?:\\[,; ])?\s*\\?(max|min)\}", r"\\arg\1"),
    (r"\\operatorname\*", r"\\operatorname"),
)
_LIMITS = ("lim", "max", "min", "sup", "inf", "arg\u2009max", "arg\u2009min")


def mathml(tex: str, display: bool) -> str:
    """Converts one formula to MathML Core, the part of MathML that browsers draw.

    latex2mathml passes over what it does not know, and leaves spacing and alignment to attributes that MathML Core dropped;
    both are mended here.

    Raises:
        ValueError: The formula holds an unknown command, unbalanced braces, or `&` or a line break outside an environment.
    """
    bare = re.sub(r"\\.", "", tex)
    if bare.count("{") != bare.count("}"):
        raise ValueError("unbalanced braces")
    for pattern, replacement in _TEX_SPELLINGS:
        tex = re.sub(pattern, replacement, tex)
    tree = Converter(display="block" if display else "inline").convert_to_element(tex)
    for node in tree.iter():
        text = html.unescape(node.text or "")
        node.text = text = re.sub(r"\\([$%&#_{}])", r"\1", text) if node.tag == "mtext" else text
        if "\\" in text or text == "&" or node.get("linebreak"):
            raise ValueError(f"{text or 'a line break'} is not known here")
        if (
            node.tag in ("mi", "mo") and len(text) > 1 and "".join(text.split()).isalpha()
        ):  # a function's name
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
            padding = (
                ";padding-inline:0"
                if node.attrib.pop("columnspacing", "").startswith("0em")
                else ""
            )
            for cell in node.iter("mtd"):
                if align := cell.attrib.pop(
                    "columnalign", None
                ):  # Chromium aligns a formula by the prefixed name alone
                    cell.set("style", f"text-align:{align};text-align:-webkit-{align}{padding}")
        elif display and node.tag == "msub" and node[0].text in _LIMITS:
            node.tag = "munder"
        elif node.tag == "msup" and node[1].text in (
            "′",
            "″",
            "‴",
        ):  # which math fonts draw raised already
            node.tag, node[1].tag, node[1].attrib = "mrow", "mo", {"lspace": "0", "rspace": "0"}
        elif node.tag in ("mover", "munder") and node[1].text == "―":
            node.set("style", f"border-{'top' if node.tag == 'mover' else 'bottom'}:0.06em solid")
            node.tag = "mrow"
            node.remove(node[1])
    return ElementTree.tostring(tree, encoding="unicode", short_empty_elements=False)
