"""Pages stand alone and lose nothing: no request, MathML, alt text, anchors, odd outputs."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from src import ROOT
from tools import notebooks, page

PIXEL = "iVBORw0KGgo="
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 5"><rect width="9" height="5"/></svg>'
PROSE = r"""# A notebook about $\mathcal{L}$

See [the loss](#4.-The-loss,-at-last), [theory](../theory/1_a.md), [other](other.ipynb#A-part),
https://arxiv.org. It costs \$5 in `$HOME`; here $\lVert x
\rVert_2 < \frac{1}{2}$, wrapped.

> The task, with $K = 5$ classes.

![A black bar](figures/bar.svg)

*Figure T1. The bar.*

| network | loss |
|---|--:|
| U-Net | $10^{-3}$ |

## 4. The loss, at last

$$
L = \frac{1}{N} \sum_{i=1}^{N} \max\left(0, d_i + m\right)
$$

1. In a list: $$\begin{cases} a & x > 0 \\ b \end{cases}$$

### A part

```python
print("$x$")
```
### A part
"""


def shown(data, metadata=None):
    return new_output("display_data", data=data, metadata=metadata or {})


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def code(*outputs, source="run()", tags=()):
    return new_code_cell(
        source, execution_count=3, outputs=list(outputs), metadata={"tags": list(tags)}
    )


def write(folder, *cells):
    """Write a notebook of cells, text as Markdown, beside a figure; give its path."""
    (folder / "notebooks" / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "notebooks" / "figures" / "bar.svg").write_text(SVG)
    cells = [new_markdown_cell(cell) if isinstance(cell, str) else cell for cell in cells]
    path = folder / "notebooks" / "sample.ipynb"
    path.write_text(json.dumps(new_notebook(cells=cells)))
    return path


def convert(folder, *cells):
    out = folder / "reports" / "sample.html"
    page.notebook_to_html(write(folder, *cells), out)
    return BeautifulSoup(out.read_text(encoding="utf-8"), "html.parser")


def output(folder, *outputs, **cell):
    """The part of a page that shows these outputs, after a check that the page goes on below."""
    soup = convert(folder, "# Title", code(*outputs, **cell), "## The end")
    assert soup.main.find("h2", string="The end").find_parent(class_="cell") is None
    assert_alone(soup)
    return soup.find(class_="outputs")


def assert_alone(soup):
    """Nothing in the page runs, and nothing is requested."""
    policy = soup.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
    sources = [rule.split()[1:] for rule in policy.split(";")]
    assert sources == [["'none'"], ["data:"], ["data:"], ["data:"], ["'unsafe-inline'"]]
    assert not soup.find_all(["script", "iframe", "frame", "object", "embed", "base", "form"])
    assert [tag["href"] for tag in soup.find_all("link")] == ["data:,"]
    assert all(tag["src"].startswith("data:") for tag in soup.select("[src]"))
    assert not re.search(r"@import|url\((?!data:font)", "".join(map(str, soup.head("style"))))
    assert all(image["alt"].strip() for image in soup.find_all("img"))


def assert_whole(soup):
    """What an author must not leave: broken links, pictures or formulas, gaps in the outline."""
    assert_alone(soup)
    assert not re.search(r"\[(missing|left out):|No description has been", str(soup.main))
    for link in soup.select("a[href^='#']"):
        assert soup.find(id=link["href"][1:]), link
    for formula in soup("math"):
        assert "\\" not in formula.text and not formula.find("mi", string="&"), formula
    for quoted in soup(["code", "pre"]):
        quoted.extract()
    assert not re.search(r"\$|\\[a-z]", soup.main.text)
    levels = [int(heading.name[1]) for heading in soup.main(re.compile("^h[1-6]$"))]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in zip(levels, levels[1:]))
    listed = [link["href"][1:] for link in soup.nav("a")]
    assert listed == [heading["id"] for heading in soup.main(["h2", "h3"])] and len(listed) > 2


# --- text -----------------------------------------------------------------------------------------
def test_text_stands_alone_with_its_formulas_figures_and_outline(tmp_path):
    soup = convert(tmp_path, PROSE)
    assert soup.html["lang"] == "en" and soup.title.text.startswith("A notebook about")
    assert soup.figure.img["alt"] == "A black bar"
    assert soup.figure.figcaption.text == "Figure T1. The bar."
    assert (
        soup.find("mo", string="‖")["rspace"] == "0"
        and len(soup("math")) == 6
        and len(soup.select(".formula > math[display='block']")) == 2
    )
    assert "$5" in soup.text and soup.find("code", string="$HOME")
    assert soup.blockquote.math and soup.select(".scroll > table td math")
    assert [tag.text for tag in soup.select(".tex")][1] == "‖x‖2<12,", "no break before the comma"
    assert soup.select("h2 ~ ol .formula mtd") and soup.find("span", class_="nb", string="print")
    targets = [link["href"] for link in soup.main("a")]
    assert targets[:2] == ["#4-the-loss-at-last", "../theory/1_a.md"]
    assert targets[2:] == ["other.html#a-part", "https://arxiv.org"]
    headings = [heading["id"] for heading in soup.main(["h2", "h3"])]
    assert headings == ["4-the-loss-at-last", "a-part", "a-part-1"]
    for dollar in soup.find_all(string=re.compile(r"\$5")):
        dollar.replace_with("")
    assert_whole(soup)


@pytest.mark.parametrize(
    "tex, text",
    [
        (r"\mathcal L", "ℒ"),
        (r"1{,}024", "1,024"),
        (r"x'", "x′"),
        (r"\log x", "logx"),
        (r"\begin{align*} a &= b \\ &= c \end{align*}", "a=b=c"),
        (r"\frac{", r"\frac{"),
    ],
)
def test_a_formula_is_mathml_or_shown_as_it_is_written(tex, text):
    assert BeautifulSoup(page.mathml(tex, "block"), "html.parser").text == text


def test_pictures_are_found_from_a_copy_in_attachments_and_in_html(tmp_path, monkeypatch):
    attached = new_markdown_cell(
        "# Title\n\n![a dot](attachment:dot.png) <img src='figures/bar.svg' alt='a bar'>",
        attachments={"dot.png": {"image/png": PIXEL}},
    )
    path = write(tmp_path, attached, "![gone](attachment:dot.png) ![far](https://a.org/b.png)")
    copy = tmp_path / "reports" / "standin" / "sample.ipynb"
    copy.parent.mkdir(parents=True)
    path.rename(copy)
    monkeypatch.setattr(notebooks, "FOLDER", path.parent)
    page.notebook_to_html(copy, copy.with_suffix(".html"))
    soup = BeautifulSoup(copy.with_suffix(".html").read_bytes(), "html.parser")
    assert [image["alt"] for image in soup("img")] == ["a dot", "a bar"]
    assert_alone(soup)
    assert "[missing: attachment:dot.png, gone]" in soup.text and "b.png, far]" in soup.text


# --- code and its outputs -------------------------------------------------------------------------
def test_code_is_folded_where_its_author_says_so(tmp_path):
    folded, open_ = code(source="plumbing()", tags=["hide-input"]), code(source="idea()")
    soup = convert(tmp_path, "# Title", folded, open_, code(source="class A: ...", tags=["define"]))
    (details,) = soup("details")
    assert details.pre.text.strip() == "plumbing()" and not details.has_attr("open")
    assert "1 lines of code" in details.summary.text
    assert [label.text for label in soup("p", class_="label")] == ["In [3]", "In [3] definitions"]
    assert soup.find("span", class_="k", string="class")
    printed = "".join(map(str, soup.head("style"))).split("@media print {")[1]
    assert "details.folded { display: none; }" in printed


def test_figures_have_captions_and_measured_text_its_voice(tmp_path):
    alt = 'A "black" dot'
    box = output(
        tmp_path,
        shown({"image/png": PIXEL, "text/plain": alt}, {"image/png": {"alt": alt}}),
        shown({"text/markdown": "**Figure 1.** A *dot*."}),
        shown({"image/svg+xml": SVG}, {"image/svg+xml": {"alt": "A bar"}}),
        shown({"text/markdown": "It is 7."}, {"voice": "measured"}),
    )
    assert [image["alt"] for image in box("img")] == [alt, "A bar"]
    assert [tag.text.strip() for tag in box("figcaption")] == ["Figure 1. A dot."]
    assert [tag.text.strip() for tag in box(class_="measured")] == ["It is 7."]


def test_errors_and_streams_are_shown_as_in_a_terminal(tmp_path):
    trace = ["\x1b[31mValueError\x1b[0m: bad <value>"]
    box = output(
        tmp_path,
        stream("epoch 1\n"),
        stream("\x1b[1mepoch\x1b[0m 2 <done> …\n"),
        stream("\r  0%|     | 0/2\r100%|#####| 2/2", "stderr"),
        stream("\r     \rWarning: old driver\n", "stderr"),
        stream("10 %\r20 %\n"),
        new_output("error", ename="ValueError", evalue="bad <value>", traceback=trace),
    )
    texts = [(pre["class"], pre.text) for pre in box("pre", class_=True)]
    assert texts == [
        (["stdout"], "epoch 1\nepoch 2 <done> …"),
        (["stderr"], "Warning: old driver"),
        (["stdout"], "20 %"),
    ]
    error = box.find(class_="error")
    assert error.p.text == "Error. ValueError: bad <value>"
    assert error.pre.text == "ValueError: bad <value>"


@pytest.mark.parametrize(
    "data, text",
    [
        ({"text/html": "<script>alert(1)</script>", "text/plain": "x"}, "left out: script"),
        ({"text/html": "<iframe src='https://a.org'></iframe>"}, "left out: iframe"),
        ({"text/html": "<img src='https://a.org/b.png' alt='far'>"}, "b.png, far]"),
        ({"text/html": "<img src='none.png'>"}, "missing: none.png"),
        ({"text/html": "<div><div><b>never closed"}, "never closed"),
        ({"text/markdown": r"$\frac{$ and $5"}, r"\frac{"),
        ({"text/latex": r"\begin{align*}a&=b\end{align*}"}, "a=b"),
        ({"text/plain": "\x1b[32mgreen\x1b[0m \ud800 <x>"}, "green ? <x>"),
        ({"application/javascript": "alert(1)"}, "cannot show application/javascript"),
        ({"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0/3"}, "0/3"),
        ({"image/png": PIXEL}, ""),
    ],
)
def test_odd_outputs_do_not_break_the_page(tmp_path, data, text):
    assert text in output(tmp_path, shown(data)).text


# --- the theory, and what is committed ------------------------------------------------------------
def test_the_theorys_page_has_every_answer(tmp_path):
    page.theory_to_html(tmp_path / "theory.html")
    soup = BeautifulSoup((tmp_path / "theory.html").read_bytes(), "html.parser")
    parts = sorted(path.stem for path in (ROOT / "theory").glob("*.md") if path.stem != "README")
    assert [part["id"] for part in soup("section", id=True)] == parts
    assert soup.h1.text == "Theory answers" and {part.h2.text for part in soup("section", id=True)}
    assert len(soup.find(id="0_answers").select("a[href^='#']")) > 15
    assert soup("figure") and len(soup("math")) > 100
    assert_whole(soup)  # so the links above lead to headings


@pytest.mark.parametrize("name", notebooks.names())
def test_every_notebook_has_a_whole_page(tmp_path, name):
    page.notebook_to_html(notebooks.FOLDER / f"{name}.ipynb", tmp_path / "page.html")
    assert_whole(BeautifulSoup((tmp_path / "page.html").read_bytes(), "html.parser"))


# --- what a reader sees ---------------------------------------------------------------------------
def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_color_can_be_read(scheme):
    """WCAG 2.2, success criterion 1.4.3: a contrast of at least 4.5 to 1."""
    css = Path(page.__file__).with_name("page.css").read_text(encoding="utf-8")
    palette = dict(
        re.findall(r"--([\w-]+): (#\w+)", re.findall(r":root \{(.*?)\}", css, re.S)[scheme])
    )
    pairs = [("task-text", "task"), ("link", "task"), ("error-text", "error")]
    for color in palette.keys() - {"page", "surface", "line", "task-line", "measured-line"}:
        if not re.match("task|error", color):
            pairs += [(color, "page"), (color, "surface")]
    for color, ground in pairs:
        low, high = sorted((luminance(palette[color]), luminance(palette[ground])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (color, ground)


needs_chromium = pytest.mark.skipif(
    not any(map(shutil.which, page.BROWSERS)), reason="no Chromium or Chrome: layout is not seen"
)
MEASURE = """<!doctype html><body style="margin:0">
<iframe style="border:0;width:%dpx;height:900px" srcdoc="%s"></iframe><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument;
  const broken = [...page.images].filter(image => !image.naturalWidth).length;
  const heights = [...page.querySelectorAll(".formula math")].map(m => m.clientHeight || 99);
  document.body.dataset.result = JSON.stringify(
    {width: page.documentElement.scrollWidth, broken, lowest: Math.min(99, ...heights)});
};
</script>"""


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["sample", "theory"])
def test_nothing_is_cut_off_requested_or_broken_in_a_browser(tmp_path, name, width):
    table = "<table><tr>" + "<td>0.123456789</td>" * 40 + "</tr></table>"
    long = r"A very long formula: $" + "x + " * 60 + "x$"
    if name == "sample":
        data = [{"text/html": table}, {"text/markdown": long}, {"text/plain": "x" * 300}]
        soup = convert(tmp_path, PROSE, code(*map(shown, data), source="y = " + "x + " * 60 + "x"))
    else:
        page.theory_to_html(tmp_path / "theory.html")
        soup = (tmp_path / "theory.html").read_text(encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE % (width, html.escape(str(soup))), encoding="utf-8")
    options = ["--enable-logging=stderr", "--window-size=1400,1000", "--dump-dom"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    done = page.run_program(page.BROWSERS, *page.HEADLESS, *options, frame.as_uri())
    assert "CONSOLE" not in done.stderr
    result = json.loads(html.unescape(re.search(r'data-result="(.*?)"', done.stdout)[1]))
    assert result["width"] <= width and result["broken"] == 0 and result["lowest"] > 10


@needs_chromium
@pytest.mark.skipif(not shutil.which("pdftoppm"), reason="no pdftoppm: PDFs are not drawn")
def test_the_theory_as_pdf_and_pictures(tmp_path):
    (tmp_path / "1_first.md").write_text("# Question 1\n\n$x^2$")
    stale = tmp_path / "images" / "theory-page-9.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    (picture,) = page.theory_images(stale.parent, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG") and not stale.exists()
    assert (tmp_path / "images" / "theory.pdf").read_bytes().startswith(b"%PDF")


def test_a_missing_browser_or_notebook_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "BROWSERS", ["nosuchbrowser"])
    assert page.main([str(tmp_path / "images")]) == 1
    assert page.main([str(tmp_path / "none.ipynb"), str(tmp_path / "none.html")]) == 1
    browser, notebook = capsys.readouterr().err.splitlines()
    assert browser.startswith("Error: nosuchbrowser is not installed")
    assert notebook.startswith("Error: There is no notebook 'none'")
