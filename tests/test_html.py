"""The pages stand alone: no request or script, MathML, alt text, anchors, readable colours."""

import base64
import html
import json
import re
import shutil

import bs4
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from src import ROOT, ProjectError
from tools import html as pages
from tools.html import __main__ as command
from tools.html import browser, page, theory
from tools.html.mathml import mathml
from tools.html.notebook import last_state

PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg"
    "=="
)
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 5"><rect width="10" height="5"/></svg>'
)
PROSE = r"""# A notebook about $\mathcal{L}_{\text{triplet}}$

See [the loss](#The-loss), [theory](../theory/1_fully_connected_vs_convolution.md),
[code](../src/html.py), https://arxiv.org.
It costs \$5 in `$HOME` or `$$x$$`; here $\lVert
x \rVert_2 < \frac{1}{2}$, wrapped.

> The task, with $K = 5$ classes.

![A black bar](figures/bar.svg)

| network | loss |
|---|--:|
| plain | $10^{-3}$ |

### The loss

$$
\mathcal L = \frac{1}{N} \sum_{i=1}^{N} \max\left(0, d_i + m\right)
$$

1. In a list:

   $$\begin{aligned} a &= b \\ &= c \end{aligned}$$

```bash
echo "$PATH" $$
```
"""


def display(mime, data, alt=None):
    return new_output(
        "display_data",
        data={mime: data, "text/plain": "fallback"},
        metadata={mime: {"alt": alt}} if alt else {},
    )


def write(folder, *cells):
    path = folder / "notebooks" / "sample.ipynb"
    path.parent.mkdir(exist_ok=True)
    notebook = new_notebook(
        cells=[cell if not isinstance(cell, str) else new_markdown_cell(cell) for cell in cells]
    )
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    nbformat.write(notebook, path)
    return path


def convert(folder, *cells):
    out = folder / "reports" / "sample.html"
    pages.notebook_to_html(write(folder, *cells), out)
    return out.read_text(encoding="utf-8")


def with_outputs(*outputs, source="run()", **metadata):
    return new_code_cell(source, execution_count=3, outputs=list(outputs), metadata=metadata)


@pytest.fixture
def sample(tmp_path):
    figures = tmp_path / "notebooks" / "figures"
    figures.mkdir(parents=True)
    (figures / "bar.svg").write_text(SVG)
    long = "value = " + " + ".join(["1_000"] * 40) + "  # long"
    bar = "\r  0%|          | 0/2\r 50%|#####     | 1/2"
    table = "<table><tr>" + "<td>0.123456789</td>" * 40 + "</tr></table>"
    return [
        PROSE,
        with_outputs(source=f'class A:\n    """Doc."""\n\n    {long}', tags=["define"]),
        with_outputs(
            new_output("stream", name="stderr", text=bar),
            new_output("stream", name="stdout", text="epoch 1\n"),
            new_output("stream", name="stderr", text="\r100%|##########| 2/2"),
            new_output("stream", name="stdout", text="\x1b[1mepoch\x1b[0m 2 <done>\n"),
            display("text/html", table),
            display("image/png", PIXEL, alt='One "black" pixel'),
            display("image/svg+xml", SVG, alt="A bar"),
            display(
                "text/markdown",
                r"Accuracy **99 %**, $n = 2{,}000$; a very long formula: $" + "x + " * 60 + "x$",
            ),
            new_output(
                "error",
                ename="ValueError",
                evalue="bad <value>",
                traceback=["\x1b[31mValueError\x1b[0m: bad"],
            ),
        ),
        "## Results\n\n#### Skipped a level\n\n## Results\n\n# Second title",
    ]


def test_page_stands_alone_and_reads_well(tmp_path, sample):
    text = convert(tmp_path, *sample)
    soup = bs4.BeautifulSoup(text, "html.parser")
    assert soup.html["lang"] == "en" and soup.title.text.startswith("A notebook about ℒ")
    assert not soup.find_all(["script", "iframe", "object", "embed"])
    for tag in soup.find_all(True):
        for name in ("src", "srcset", "data", "poster", "href"):
            if tag.name != "a" and name in tag.attrs:
                assert tag[name].startswith("data:"), tag
    assert not re.search(r"@import|url\((?!data:font)", text)
    assert (
        "default-src 'none'"
        in soup.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
    )
    assert [image["alt"] for image in soup.find_all("img")] == [
        "A black bar",
        'One "black" pixel',
        "A bar",
    ]
    assert base64.b64decode(soup.img["src"].split(",")[1]).decode() == SVG

    assert len(soup.find_all("math")) == 8
    assert [cell["style"] for cell in soup.main.li.find_all("mtd")] == 2 * [
        f"text-align:{side};text-align:-webkit-{side};padding-inline:0"
        for side in ("right", "left")
    ]
    for code in soup.find_all(["code", "pre"]):
        code.extract()
    assert "\\" not in soup.main.text and re.findall(r"\$\d?", soup.main.text) == ["$5"]


def test_headings_form_an_outline_and_links_resolve(tmp_path, sample):
    soup = bs4.BeautifulSoup(convert(tmp_path, *sample), "html.parser")
    headings = [(int(tag.name[1]), tag["id"]) for tag in soup.find_all(re.compile("^h[1-6]$"))]
    assert headings[1:] == [
        (2, "the-loss"),
        (2, "results"),
        (3, "skipped-a-level"),
        (2, "results-1"),
        (2, "second-title"),
    ]
    assert headings[0][0] == 1
    assert [link["href"][1:] for link in soup.nav.find_all("a")] == [
        anchor for _, anchor in headings[1:]
    ]
    targets = [link["href"] for link in soup.main.find_all("a")]
    assert targets == [
        "#the-loss",
        "../reports/theory.html#1_fully_connected_vs_convolution",
        "../src/html.py",
        "https://arxiv.org",
    ]
    with pytest.raises(ProjectError, match=r"sample.ipynb, cell 2: a link to #nowhere"):
        convert(tmp_path, "# Title", "[broken](#Nowhere)")


def test_outputs(tmp_path, sample):
    soup = bs4.BeautifulSoup(convert(tmp_path, *sample), "html.parser")
    assert [pre.text for pre in soup.find_all("pre", class_="stdout")] == [
        "epoch 1\nepoch 2 <done>"
    ]
    assert [pre.text for pre in soup.find_all("pre", class_="stderr")] == ["100%|##########| 2/2"]
    assert "ValueError: bad <value>" in soup.find(class_="error").p.text and "\x1b" not in soup.text
    assert soup.find("td", string="0.123456789").find_parent(class_="scroll")
    assert [tag.text for tag in soup.find_all(class_="tag")] == ["definitions"]
    assert (
        soup.find(class_="cell").find("span", class_="k", string="class")
        and "fallback" not in soup.text
    )


def test_page_of_a_copied_notebook_finds_the_projects_files(tmp_path, sample, monkeypatch):
    monkeypatch.setattr(page, "ROOT", tmp_path)
    copy = tmp_path / "reports" / "standin" / "sample.ipynb"
    copy.parent.mkdir(parents=True)
    write(tmp_path, *sample).rename(copy)
    pages.notebook_to_html(copy, copy.with_suffix(".html"))
    soup = bs4.BeautifulSoup(copy.with_suffix(".html").read_bytes(), "html.parser")
    assert soup.img["alt"] == "A black bar"
    assert [link["href"] for link in soup.main.find_all("a")][1:3] == [
        "../../reports/theory.html#1_fully_connected_vs_convolution",
        "../../src/html.py",
    ]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\rbc", "bc"),
        ("a\r\nb\r\n", "a\nb"),
        ("x\r   \r", ""),
        ("\x1b[32mok\x1b[0m", "ok"),
        ("10 %\b\b\b\b20 %", "20 %"),
        ("\b\ba\n\bb", "a\nb"),
        ("\x1b]8;;http://a\x07text\x1b]8;;\x07", "text"),
        ("\x1b]0;title\x07\x1b[2K\x1b[1Aup", "up"),
    ],
)
def test_stream_shows_what_a_terminal_shows(text, shown):
    assert last_state(text) == shown


@pytest.mark.parametrize(
    "cell, message",
    [
        ("![](figures/bar.svg)", "cell 2: an image without alt text"),
        ("![Missing](figures/none.svg)", "cell 2: the image figures/none.svg does not exist"),
        ("![Missing](attachment:none.png)", "cell 2: the cell has no attachment 'none.png'"),
        ("![Remote](https://example.org/a.png)", "cell 2: .*needs a script, a file or a network"),
        ('<meta http-equiv="refresh" content="0">', "cell 2: .*needs a script, a file or a netw"),
        (
            r"Here $\nonsense{x}$",
            r"cell 2: the formula '\\\\nonsense\{x\}' cannot be converted: \\nonsense is not known",
        ),
        (r"$$\frac{1}{2$$", "cell 2: the formula .* cannot be converted: unbalanced braces"),
        (r"$a & b$", "cell 2: the formula .* cannot be converted: & is not known"),
        ("A stray $ sign", r"cell 2: '\$' opens no formula"),
        (r"\begin{align} a \end{align}", r"cell 2: .*begin.* opens no formula"),
    ],
)
def test_bad_text_is_an_error_that_names_its_cell(tmp_path, cell, message):
    (tmp_path / "notebooks" / "figures").mkdir(parents=True)
    (tmp_path / "notebooks" / "figures" / "bar.svg").write_text(SVG)
    with pytest.raises(ProjectError, match="sample.ipynb, " + message):
        convert(tmp_path, "# Title", cell)
    assert not (tmp_path / "reports").exists()


# An output cannot be made again without its run: the page shows what it can, and says the rest.


@pytest.mark.parametrize(
    "data, reason, kept",
    [
        ({"image/png": PIXEL}, "a picture without alt text", "img"),
        ({"text/html": "<script>1</script>", "text/plain": "<x.HTML object>"}, "a script", None),
        ({"text/html": "<script>1</script>", "text/plain": "a table"}, "a script", "pre"),
        ({"text/html": "<style>@import 'a.css'</style>"}, "a network", None),
        ({"text/html": "<p style='background:url(http://a/b)'>x</p>"}, "a network", None),
        ({"text/html": "<iframe src='https://a'></iframe>"}, "a network", None),
        ({"text/html": "<video src='none.mp4'></video>"}, "none.mp4 does not exist", None),
        ({"application/javascript": "alert(1)"}, "cannot show application/javascript", None),
        ({"text/markdown": r"$\unknown$"}, "the formula", "pre"),
        ({"text/markdown": "costs $5"}, "opens no formula", "pre"),
        ({"text/latex": r"$\unknown$", "text/plain": "<x.Math object>"}, "the formula", "pre"),
    ],
)
def test_an_output_that_a_page_cannot_show_is_told_in_its_place(tmp_path, data, reason, kept):
    path = write(tmp_path, "# Title", with_outputs(new_output("display_data", data=data)))
    out = tmp_path / "sample.html"
    (line,) = pages.notebook_to_html(path, out)
    assert line.startswith("sample.ipynb, cell 2: ") and reason in line
    outputs = bs4.BeautifulSoup(out.read_bytes(), "html.parser").find(class_="outputs")
    assert reason in outputs.find(class_="omitted").text
    tags = {tag.name for tag in outputs.find_all(["img", "pre", "script", "iframe", "video"])}
    assert tags == ({kept} if kept else set())


def test_what_people_put_into_notebooks_is_shown(tmp_path):
    wav = "data:audio/wav;base64,UklGRg=="
    attached = new_markdown_cell(
        "# Title\n\n![a dot](attachment:dot.png) <img src='figures/bar.svg' alt='a bar'>",
        attachments={"dot.png": {"image/png": PIXEL}},
    )
    (tmp_path / "notebooks" / "figures").mkdir(parents=True)
    (tmp_path / "notebooks" / "figures" / "bar.svg").write_text(SVG)
    text = convert(
        tmp_path,
        attached,
        with_outputs(
            display("text/latex", r"$\displaystyle x^2$"),
            display("text/latex", r"\begin{align}a&=b\\c&=d\end{align}"),
            display("text/html", f'<audio controls><source src="{wav}"></audio>'),
            display("text/html", "<div><b>never closed"),
        ),
        r"$$a = b \tag{7} \label{eq}$$ and $\cancel{x} + \bcancel{y}$",
    )
    soup = bs4.BeautifulSoup(text, "html.parser")
    assert [image["alt"] for image in soup.find_all("img")] == ["a dot", "a bar"]
    assert all(image["src"].startswith("data:image/") for image in soup.find_all("img"))
    assert soup.audio.source["src"] == wav and "media-src data:" in text
    assert [m.text for m in soup.find_all("math")] == ["x2", "a=bc=d", "a=b(7)", "x+y"]
    assert [m["notation"] for m in soup.find_all("menclose")] == [
        "updiagonalstrike",
        "downdiagonalstrike",
    ]
    assert soup.find("b", string="never closed").find_parent(class_="cell").find_next("math")
    assert (
        not soup.find(class_="omitted")
        and soup.find_all("math")[-1].find_parent(class_="prose").parent.name == "main"
    ), "the cell after the unclosed one stands by itself"


def test_sound_films_and_pictures_from_files_and_data_are_embedded(tmp_path):
    """As IPython's Audio, Video, Image and SVG, and a browser's own tags, put them into outputs."""
    folder, film = tmp_path / "notebooks", "data:video/mp4;base64,AAAAHGZ0eXA="
    folder.mkdir()
    for name in ("film.mp4", "sound.wav", "fig.png"):
        (folder / name).write_bytes(base64.b64decode(PIXEL))
    text = convert(
        tmp_path,
        "# Title\n\n<video controls src='film.mp4'></video>",
        with_outputs(
            display("text/html", f'<video src="{film}" controls>Your browser has none.</video>'),
            display("text/html", f'<video controls><source type="video/mp4" src="{film}"></video>'),
            display("text/html", '<audio controls><source src="sound.wav"/></audio>'),
            display("text/html", '<img src="fig.png" width="3" alt="A dot"/>'),
            display("image/svg+xml", SVG, alt="A bar"),
        ),
    )
    soup = bs4.BeautifulSoup(text, "html.parser")
    assert not soup.find(class_="omitted")
    films = [tag["src"] for tag in soup.select("video[src], video > source")]
    assert films == [f"data:video/mp4;base64,{PIXEL}", film, film]
    assert soup.audio.source["src"].startswith("data:audio/") and "wav;base64," in str(soup.audio)
    assert [image["alt"] for image in soup.find_all("img")] == ["A dot", "A bar"]
    assert all(image["src"].startswith("data:image/") for image in soup.find_all("img"))


def test_an_img_without_alt_text_is_shown_and_told(tmp_path):
    (tmp_path / "notebooks" / "figures").mkdir(parents=True)
    (tmp_path / "notebooks" / "figures" / "bar.svg").write_text(SVG)
    image, out = "<img src='figures/bar.svg' width='10'>", tmp_path / "sample.html"
    shown = with_outputs(display("text/html", image))
    lines = pages.notebook_to_html(write(tmp_path, f"# Title\n\n{image}", shown), out)
    told = "a picture without alt text; write <img alt="
    assert [line.split('"')[0] for line in lines] == [
        f"sample.ipynb, cell {number}: {told}" for number in (1, 2)
    ]
    images = bs4.BeautifulSoup(out.read_bytes(), "html.parser").find_all("img")
    assert [i["alt"] for i in images] == [page.UNDESCRIBED] * 2
    assert all(i["src"].startswith("data:image/svg+xml;base64,") for i in images)


def test_control_characters_never_reach_the_page(tmp_path):
    link = "\x1b]8;;http://a\x1b\\text\x1b]8;;\x1b\\"
    text = convert(
        tmp_path,
        "# Title \x07",
        with_outputs(
            new_output("stream", name="stdout", text=f"a\bc {link} \x00\x0b\x1b[31mred\x1b[0m"),
            display("text/html", "<p>\x08html \ufffe</p>"),
        ),
    )
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text)
    assert '<pre class="stdout">c text red</pre>' in text


def test_folded_code_and_captions(tmp_path):
    text = convert(
        tmp_path,
        "# Title\n\n[down](#4.-The-loss,-at-last)",
        with_outputs(
            display("image/png", PIXEL, alt="A dot"),
            display("text/markdown", "**Figure 1.** A *dot*."),
            new_output("stream", name="stdout", text="profile"),
            source="plumbing()",
            tags=["hide-input"],
        ),
        with_outputs(source="idea()"),
        "## 4. The loss, at last",
    )
    soup = bs4.BeautifulSoup(text, "html.parser")
    folded = soup.find("details")
    assert folded.pre.text == "plumbing()" and not folded.has_attr("open")
    assert "1 lines of code" in folded.summary.text
    assert [pre.text for pre in soup.find_all("pre", class_="code")] == ["plumbing()", "idea()"]
    assert len(soup.find_all("details")) == 1
    assert soup.figure.img["alt"] == "A dot" and soup.figcaption.text.strip() == "Figure 1. A dot."
    assert soup.find("pre", class_="stdout").find_parent("figure") is None
    assert soup.main.a["href"] == "#4-the-loss-at-last" == f"#{soup.h2['id']}"
    printed = page._style().split("@media print {")[1]
    assert "details.folded { display: none; }" in printed


def test_only_measured_text_carries_the_voice_of_measurements(tmp_path):
    said = display("text/markdown", "It is 7.")
    said.metadata["voice"] = "measured"
    text = convert(tmp_path, with_outputs(said, display("text/markdown", "It follows.")))
    soup = bs4.BeautifulSoup(text, "html.parser")
    assert [tag.text.strip() for tag in soup.find_all(class_="measured")] == ["It is 7."]


def test_line_endings_do_not_matter_to_the_digest(tmp_path):
    path = write(tmp_path, "# Title\n\ntext")
    before = pages.digest(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert pages.digest(path) == before
    path.write_bytes(path.read_bytes().replace(b"text", b"word"))
    assert pages.digest(path) != before


def test_unreadable_notebook_and_unwritable_folder(tmp_path, capsys):
    broken = tmp_path / "broken.ipynb"
    broken.write_text("{")
    for path in (broken, tmp_path / "missing.ipynb"):
        with pytest.raises(ProjectError, match=f"{path.name} is not a readable notebook"):
            pages.notebook_to_html(path, tmp_path / "out.html")
    (tmp_path / "file").write_text("mine")
    assert (
        command.main(
            ["notebook", str(write(tmp_path, "# Title")), str(tmp_path / "file" / "out.html")]
        )
        == 1
    )
    error = capsys.readouterr().err
    assert error.startswith("error: out.html cannot be written in file/") and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine" and not list(tmp_path.rglob("*.part"))


def test_same_input_gives_same_bytes(tmp_path, sample):
    assert convert(tmp_path, *sample) == convert(tmp_path, *sample)


@pytest.mark.parametrize(
    "tex, expected",
    [
        (r"\mathcal L", "ℒ"),
        (r"1{,}024", "1,024"),
        (r"\operatorname*{arg\,max}_x", "arg\u2009maxx"),
        (r"\text{50\%}", "50%"),
        (r"x'", "x′"),
        (r"\lfloor x \rfloor", "⌊x⌋"),
        (r"\begin{cases} 1 & x < 0 \\ 0 \end{cases}", "{1x<00"),
    ],
)
def test_formulas(tex, expected):
    element = bs4.BeautifulSoup(mathml(tex, display=True), "html.parser")
    assert element.text == expected
    assert not element.find_all(columnalign=True) and not element.find_all(mathvariant="script")


def test_limits_stand_below_in_displays_only():
    assert "<munder>" in mathml(r"\max_i x_i", True) and "<munder>" not in mathml(
        r"\max_i x_i", False
    )


def write_theory(folder):
    figures = folder / "theory" / "figures"
    figures.mkdir(parents=True)
    (figures / "bar.svg").write_text(SVG)
    (folder / "theory" / "1_first.md").write_text(
        "# Question 1\n\n## Answer\n\n> *Which?*\n\n$x^2$\n\n"
        "[second](2_second.md#Answer) [part](2_second.md) [here](#answer)\n",
        "utf-8",
    )
    (folder / "theory" / "2_second.md").write_text(
        "# Question 2\n\n## Answer\n\n![A bar](figures/bar.svg)\n", "utf-8"
    )


def test_theory_is_one_page(tmp_path, monkeypatch):
    out = tmp_path / "reports" / "theory.html"
    monkeypatch.setattr(theory, "ROOT", tmp_path)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    with pytest.raises(ProjectError, match="no theory to show"):
        pages.theory_to_html(out)
    write_theory(tmp_path)
    pages.theory_to_html(out)
    soup = bs4.BeautifulSoup(out.read_bytes(), "html.parser")
    assert [(tag.name, tag.text) for tag in soup.find_all(re.compile("^h[1-6]$"))] == [
        ("h1", "Theory answers"),
        ("h2", "Question 1"),
        ("h3", "Answer"),
        ("h2", "Question 2"),
        ("h3", "Answer"),
    ]
    links = [link["href"][1:] for link in soup.find_all("a")]
    assert links[-3:] == ["2_second-answer", "2_second", "1_first-answer"]
    assert all(soup.find(id=link) for link in links) and len(links) == 7
    assert soup.img["src"].startswith("data:image/svg+xml;base64,") and soup.img["alt"] == "A bar"


# Contrast: WCAG 2.2, success criterion 1.4.3: 4.5 to 1.


def luminance(colour):
    digits = colour.lstrip("#") if len(colour) > 4 else "".join(2 * digit for digit in colour[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, two):
    dark, light = sorted((luminance(one), luminance(two)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_every_colour(scheme):
    css = page._style()
    assert contrast("#000000", "#fff") == pytest.approx(21)
    palettes = re.findall(r":root \{(.*?)\}", css, re.S)
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", palettes[0]))
    if scheme == "dark":
        colours.update(re.findall(r"--([\w-]+): (#\w+)", palettes[1]))
    pairs = [(text, ground) for text in ("text", "muted", "link") for ground in ("page", "surface")]
    pairs += [("task-text", "task"), ("link", "task"), ("error-text", "error"), ("text", "task")]
    measured = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    block = re.search(
        rf"@media [^{{]*\(prefers-color-scheme: {scheme}\) \{{\n(\.code.*?)\n\}}", css, re.S
    )[1]
    for rule in block.splitlines():
        ground = re.search(r"background-color: (#\w+)", rule)
        if colour := re.search(r"(?<!-)color: (#\w+)", rule):
            measured[rule] = contrast(colour[1], ground[1] if ground else colours["surface"])
    assert len(measured) > 40 and min(measured.values()) >= 4.5, min(
        measured.items(), key=lambda item: item[1]
    )


# In the browser. The page forbids scripts, so a frame around it measures.

MEASURE = """<!doctype html><body style="margin:0">
<iframe style="border:0;width:%dpx;height:900px" srcdoc="%s"></iframe><script>
onload = () => {
  const page = document.querySelector("iframe").contentDocument, view = page.defaultView;
  const colour = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = c => c.slice(0, 3).map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let lowest = 21;
  for (const element of page.body.querySelectorAll("*")) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    let ground = element;
    const of = element => view.getComputedStyle(element);
    while (ground && colour(of(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
    const pair = [of(element).color, of(ground || page.body).backgroundColor]
      .map(colour).map(luminance).sort((a, b) => a - b);
    lowest = Math.min(lowest, (pair[1] + 0.05) / (pair[0] + 0.05));
  }
  const broken = [...page.images].filter(image => !image.naturalWidth).length;
  const heights = [...page.querySelectorAll(".formula math")]
    .map(formula => formula.getBoundingClientRect().height);
  document.body.dataset.result = JSON.stringify({
    width: page.documentElement.scrollWidth, lowest, broken,
    math: heights.length ? Math.max(...heights) : 99,
    ground: view.getComputedStyle(page.body).backgroundColor});
};
</script>"""


def needs_chromium():
    if not any(map(shutil.which, browser.BROWSERS)):
        pytest.skip(
            "no Chromium or Chrome installed: layout and contrast are not measured in a browser"
        )


def check_in_a_browser(text, folder, width, scheme):
    """Open a page with no network: no console message, overflow or broken image; contrast."""
    needs_chromium()
    frame = folder / "frame.html"
    frame.write_text(MEASURE % (width, html.escape(text)), encoding="utf-8")
    run = browser.run_chromium(
        "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        "--window-size=1400,1000",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--dump-dom",
        frame.as_uri(),
    )
    assert "CONSOLE" not in run.stderr
    result = json.loads(html.unescape(re.search(r'data-result="(.*?)"', run.stdout)[1]))
    assert result["width"] <= width and result["broken"] == 0 and result["math"] > 20
    assert (
        result["lowest"] >= 4.5
        and result["ground"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 19, 24)"}[scheme]
    )


@pytest.mark.parametrize("width, scheme", [(390, "light"), (1280, "dark")])
def test_page_in_a_browser(tmp_path, sample, width, scheme):
    check_in_a_browser(convert(tmp_path, *sample), tmp_path, width, scheme)


COMMITTED = sorted(path.name for path in (ROOT / "reports").glob("*.html"))


@pytest.mark.parametrize("name", COMMITTED)
@pytest.mark.parametrize("width, scheme", [(390, "dark"), (1280, "light")])
def test_committed_page_in_a_browser(tmp_path, name, width, scheme):
    check_in_a_browser(
        (ROOT / "reports" / name).read_text(encoding="utf-8"), tmp_path, width, scheme
    )


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_page_has_an_outline_and_a_table_of_contents(name):
    soup = bs4.BeautifulSoup((ROOT / "reports" / name).read_bytes(), "html.parser")
    levels = [int(tag.name[1]) for tag in soup.find_all(re.compile("^h[1-6]$"))]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in zip(levels, levels[1:])), (
        "a level is left out"
    )
    sections = {tag["id"] for tag in soup.find_all(["h2", "h3"])}
    links = [link["href"].removeprefix("#") for link in soup.nav.find_all("a")]
    assert set(links) == sections and len(links) == len(sections) > 2, (
        "the contents name every section and nothing else"
    )
    assert all(len(soup.find_all(id=link)) == 1 for link in links)
    assert soup.find_all("img") and all(image["alt"].strip() for image in soup.find_all("img"))


def test_theory_images(tmp_path, monkeypatch):
    monkeypatch.setattr(theory, "ROOT", tmp_path)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    write_theory(tmp_path)
    monkeypatch.setattr(browser, "BROWSERS", ())
    with pytest.raises(
        ProjectError, match="no Chromium or Chrome is installed: apt-get install chromium"
    ):
        pages.theory_images(tmp_path / "images")
    monkeypatch.undo()
    monkeypatch.setattr(theory, "ROOT", tmp_path)
    monkeypatch.setattr(page, "ROOT", tmp_path)
    needs_chromium()
    if not shutil.which("pdftoppm"):
        pytest.skip("no pdftoppm installed: the PDF's pages cannot be drawn")
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "images" / "theory-page-9.png").write_bytes(b"of an earlier run")
    drawn = pages.theory_images(tmp_path / "images")
    assert len(drawn) == 2 and sorted((tmp_path / "images").glob("*.png")) == drawn
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in drawn)


def test_theory_of_the_project(tmp_path):
    pages.theory_to_html(tmp_path / "theory.html")
    soup = bs4.BeautifulSoup((tmp_path / "theory.html").read_bytes(), "html.parser")
    for code in soup.find_all(["code", "pre"]):
        code.extract()
    assert not re.search(r"\\[a-zA-Z]|\$", soup.main.text)
    assert len(soup.find_all("section")) == len(theory.parts())
