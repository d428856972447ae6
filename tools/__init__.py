"""What `make` runs."""

import os

# GCC's OpenMP lets a thread without work spin for milliseconds, in the way of those that have some:
# beside a busy program that costs up to half of the speed. Read when PyTorch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
