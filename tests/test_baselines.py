"""What costs nothing: the mean mask, the filled box, the linear probe."""

import torch

from src import baselines, objects


def views(masks, deepest=None, labels=None):
    n = len(masks)
    deepest = torch.zeros(n, 4, 2, 2) if deepest is None else deepest
    labels = torch.zeros(n, dtype=torch.long) if labels is None else labels
    return objects.Views([deepest.half()], masks, labels, torch.arange(n))


def test_the_mean_mask_is_cut_where_it_fits_best():
    masks = torch.zeros(10, 6, 6, dtype=torch.bool)
    masks[:, 2:4, 2:4] = True  # in all
    masks[0, :, :] = True  # in one
    found = baselines.mean_mask([views(masks[:5]), views(masks[5:])])
    assert torch.equal(found, masks[1])
    level = objects.mask_iou(found[None], masks).mean()
    for other in (masks[0], masks[1] & False):
        assert level > objects.mask_iou(other[None], masks).mean()


def test_the_box_is_the_tight_one():
    masks = torch.zeros(3, 8, 9, dtype=torch.bool)
    masks[0, 2, 3] = masks[0, 5, 1] = True
    masks[1, :, 8] = True
    found = baselines.filled_box(masks)
    wanted = torch.zeros_like(masks)
    wanted[0, 2:6, 1:4] = True
    wanted[1, :, 8] = True
    assert torch.equal(found, wanted), "and nothing for an empty mask"


def test_the_linear_probe_finds_a_linear_rule_and_no_more():
    generator = torch.Generator().manual_seed(0)

    def draw(n, rule):
        x = torch.randn(n, 4, 2, 2, generator=generator)
        mean = x.mean(dim=(2, 3))
        labels = rule(mean).long()
        return views(torch.zeros(n, 2, 2, dtype=torch.bool), x, labels)

    def accuracy(rule):
        train, val, test = ([draw(200, rule), draw(200, rule)], draw(200, rule), draw(500, rule))
        probe = baselines.linear_probe(train, val, 2)
        logits = probe(test)
        assert logits.shape == (500, 2) and not logits.requires_grad
        return float((logits.argmax(dim=1) == test.labels).float().mean())

    assert accuracy(lambda mean: mean[:, 0] > mean[:, 2]) > 0.95
    assert accuracy(lambda mean: mean[:, 0] * mean[:, 2] > 0) < 0.62


def test_the_decay_is_chosen_on_validation():
    """With random labels, the strongest decay is the best; with a clear rule, the weakest."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 20, 1, 1, generator=generator)
    masks = torch.zeros(60, 2, 2, dtype=torch.bool)
    noise = torch.randint(0, 2, (60,), generator=generator)
    val = views(masks, torch.randn(60, 20, 1, 1, generator=generator), noise)
    probe = baselines.linear_probe([views(masks, x, noise.flip(0))], val, 2, decays=(1e-4, 10.0))
    assert probe(val).std() < 0.2
    rule = (x[:, 0, 0, 0] > 0).long()
    train = views(masks, x, rule)
    probe = baselines.linear_probe([train], train, 2, decays=(1e-4, 10.0))
    assert probe(train).std() > 2
