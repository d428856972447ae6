"""From scores to answers: thresholds and probabilities, chosen on validation samples."""

import torch
import torch.nn.functional as F
from torch import Tensor


def choose_thresholds(scores: Tensor, labels: Tensor) -> Tensor:
    """For each of L labels the threshold with most right answers on given samples.

    Args:
        scores, labels: (N, L), N at least 2; a score above its threshold means yes.

    Returns:
        (L,): of the best thresholds, the middle of the widest gap between neighbouring scores.
    """
    chosen = []
    for score, label in zip(scores.T.double(), labels.T > 0):
        score, order = score.sort()
        yes = label[order]
        # With the threshold behind position i: no is right up to it, yes is right after it.
        correct = (~yes).cumsum(0)[:-1] + yes.sum() - yes.cumsum(0)[:-1]
        gap = torch.where(correct == correct.max(), score.diff(), -1.0)
        chosen.append((score[:-1] + score.diff() / 2)[gap.argmax()])
    return torch.stack(chosen).float()


def choose_slopes(scores: Tensor, labels: Tensor, thresholds: Tensor) -> Tensor:
    """For each label the slope with which sigmoid(slope * (score - threshold)) fits best.

    Platt's scaling (1999) around given thresholds: scores and labels (N, L), thresholds and the
    result (L,).
    """
    grid = torch.logspace(-1.5, 1.5, 61)
    logits = (scores - thresholds)[None] * grid[:, None, None]
    loss = F.binary_cross_entropy_with_logits(logits, labels.expand_as(logits), reduction="none")
    return grid[loss.mean(dim=1).argmin(dim=0)]
