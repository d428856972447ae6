"""Self-contained HTML of an executed notebook and of the theory: one file each, no network needed.

Formulas become MathML (latex2mathml), images data URIs, highlighting inline CSS (Pygments); there
is no script, and the page's own Content-Security-Policy forbids any request in the browser too.

    python -m tools.html notebook notebooks/NAME.ipynb reports/NAME.html
    python -m tools.html theory reports/theory.html
    python -m tools.html images reports/theory
"""

from tools.html.notebook import notebook_to_html
from tools.html.page import digest
from tools.html.theory import theory_images, theory_text, theory_to_html

__all__ = ["digest", "notebook_to_html", "theory_images", "theory_text", "theory_to_html"]
