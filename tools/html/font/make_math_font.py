"""Make math.woff2: the formulas' font, a subset of STIX Math with quadratic outlines.

    pip install fonttools brotli
    python make_math_font.py STIXMath-Regular.otf math.woff2     # fonts-stix 1.1.1 of Debian

Quadratic (TrueType) outlines, because Chromium prints others as drawings without a font's name.
"""

import sys

from fontTools import subset
from fontTools.pens.cu2quPen import Cu2QuPen
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import newTable

NAME = "Coursework Math"


def span(first, last):
    return set(range(first, last + 1))


CHARACTERS = (
    span(0x20, 0x7E)
    | span(0xA0, 0xFF)
    | span(0x391, 0x3C9)
    | {0x3D1, 0x3D5, 0x3F5}
    | span(0x2010, 0x2016)
    | span(0x2018, 0x201D)
    | span(0x2032, 0x2034)
    | {0x2026, 0x210E, 0x2112}
    | span(0x2061, 0x2063)
    | span(0x2190, 0x2194)
    | span(0x2200, 0x222B)
    | {0x223C, 0x2243, 0x2248}
    | span(0x2260, 0x226B)
    | {0x2282, 0x2286, 0x2295, 0x2297, 0x2299, 0x22A4, 0x22A5, 0x22C5}
    | span(0x22EE, 0x22F1)
    | span(0x2308, 0x230B)
    | {0x27E8, 0x27E9, 0x302, 0x303, 0x2C6, 0x2DC, 0xAF}
    | span(0x1D400, 0x1D467)
    | span(0x1D49C, 0x1D4CF)
    | span(0x1D538, 0x1D551)
    | span(0x1D6A8, 0x1D71B)
)


def main(source, target):
    options = subset.Options()
    options.layout_features = ["ssty", "dtls"]
    options.name_IDs = [0, 1, 2, 4, 6, 13, 14]
    options.hinting, options.recalc_bounds = False, True
    options.notdef_outline = True
    options.drop_tables += ["FFTM", "DSIG"]
    options.flavor = "woff2"
    font = subset.load_font(source, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=CHARACTERS)
    subsetter.subset(font)
    order, glyphs = font.getGlyphOrder(), {}
    drawn = font.getGlyphSet()
    for name in order:
        pen = TTGlyphPen(drawn)
        drawn[name].draw(Cu2QuPen(pen, max_err=1.0, reverse_direction=True))
        glyphs[name] = pen.glyph()
    font["loca"], font["glyf"] = newTable("loca"), newTable("glyf")
    font["glyf"].glyphOrder, font["glyf"].glyphs = order, glyphs
    del font["CFF "]
    for glyph in glyphs.values():
        glyph.recalcBounds(font["glyf"])
    maxp = font["maxp"]
    maxp.tableVersion = 0x00010000
    for key in (
        "maxZones maxTwilightPoints maxStorage maxFunctionDefs maxInstructionDefs "
        "maxStackElements maxSizeOfInstructions"
    ).split():
        setattr(maxp, key, 1 if key == "maxZones" else 0)
    maxp.maxComponentElements = 0
    font["post"].formatType = 3.0
    font["post"].extraNames, font["post"].mapping = [], {}
    font.sfntVersion = "\000\001\000\000"
    for record in list(font["name"].names):
        text = {1: NAME, 4: NAME, 6: NAME.replace(" ", "")}.get(record.nameID)
        if text:
            record.string = text
    subset.save_font(font, target, options)


if __name__ == "__main__":
    main(*sys.argv[1:])
