"""Worked arithmetic of the theory: output sizes, parameters, and receptive fields along one axis.

Sizes: Dumoulin & Visin 2016, arXiv:1603.07285. Fields: Dang Ha The Hien 2017, "A guide to receptive
field arithmetic for Convolutional Neural Networks". Positions count pixels: the first one's center
is 0, negative ones are padding.
"""

from typing import NamedTuple


def output_size(n, kernel, stride=1, padding=0, dilation=1):
    """Positions of a window along `n` pixels, padded on both sides (below 1: it does not fit)."""
    return (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def parameters(kernel, channels, filters, bias=True):
    """Weights, and a bias per filter, of a convolution with a square kernel."""
    return kernel**2 * channels * filters + (filters if bias else 0)


class Field(NamedTuple):
    """Receptive field along one axis, in input pixels."""

    size: int = 1
    jump: int = 1  # between the fields of neighboring neurons
    start: float = 0.0  # center of the first neuron's field

    def after(self, kernel, stride=1, padding=0, dilation=1):
        """The field after one more sliding window."""
        reach = dilation * (kernel - 1)
        start = self.start + (reach / 2 - padding) * self.jump
        return Field(self.size + reach * self.jump, self.jump * stride, start)

    def span(self, neuron=0):
        """First and last input pixel that a neuron sees."""
        first = round(self.start + neuron * self.jump - (self.size - 1) / 2)
        return first, first + self.size - 1


def walk(layers, n):
    """Output size and field after each (kernel, stride, padding, dilation) on `n` pixels."""
    steps, field = [], Field()
    for layer in layers:
        n, field = output_size(n, *layer), field.after(*layer)
        steps.append((n, field))
    return steps
