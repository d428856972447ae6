"""What costs nothing: answers that hardly look at the image, to measure networks against."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.objects import Views, mask_iou


def mean_mask(train_views: Sequence[Views]) -> Tensor:
    """The mean of all training masks, cut at the level that suits them best: (S, S) bool."""
    masks = torch.cat([views.masks for views in train_views])
    mean = masks.float().mean(dim=0)
    levels = [level for level in torch.linspace(0.05, 0.6, 12).tolist() if (mean > level).any()]
    return mean > max(levels, key=lambda level: float(mask_iou((mean > level)[None], masks).mean()))


def filled_box(masks: Tensor) -> Tensor:
    """The tight box of every mask (N, S, S), filled; empty where the mask is."""

    def between(lines: Tensor) -> Tensor:  # (N, S): from the first to the last line that is met
        met = lines.int()
        return (met.cumsum(1) > 0) & (met.flip(1).cumsum(1).flip(1) > 0)

    return between(masks.any(dim=2))[:, :, None] & between(masks.any(dim=1))[:, None, :]


def linear_probe(
    train_views: Sequence[Views],
    val: Views,
    classes: int,
    decays: Sequence[float] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
) -> Callable[[Views], Tensor]:
    """Fit a logistic regression on the mean of the deepest map; its decay is chosen on validation.

    Returns:
        A function of `Views` that gives logits (N, classes).
    """

    def pooled(views: Views) -> Tensor:
        return views.levels[-1].float().mean(dim=(2, 3))

    x = torch.cat([pooled(views) for views in train_views])
    labels = torch.cat([views.labels for views in train_views])
    mean, scale = x.mean(dim=0), x.std(dim=0) + 1e-6
    x, best = (x - mean) / scale, None
    for decay in decays:
        layer = nn.Linear(x.shape[1], classes)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.LBFGS(
            layer.parameters(), max_iter=50, line_search_fn="strong_wolfe"
        )

        def closure(layer=layer, optimizer=optimizer, decay=decay) -> Tensor:
            optimizer.zero_grad()
            penalty = decay * layer.weight.square().sum()
            loss = F.cross_entropy(layer(x), labels) + penalty
            loss.backward()
            return loss

        optimizer.step(closure)
        layer.requires_grad_(False)
        loss = float(F.cross_entropy(layer((pooled(val) - mean) / scale), val.labels))
        if best is None or loss < best[0]:
            best = loss, layer
    return lambda views: best[1]((pooled(views) - mean) / scale)
