"""The archive to hand in, and the proof that it runs elsewhere (`make submission`, `make rerun`).

    python -m tools.submission build --name=NAME --id=ID [--collaborators=NAMES] [--allow-standin]
    python -m tools.submission rerun [--zip=FILE] [--python=INTERPRETER]

`build` packs what is handed in, or lists every problem. `rerun` does what a grader does: an empty
folder, a fresh environment, every notebook from top to bottom, every number beside the stored one.
"""
