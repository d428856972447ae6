"""`python -m tools.drawn`: train the Changer as the assignment draws it (`make drawn`).

Beside it, two networks that differ in one thing each: with pooling, and with pooling but without
dropout, as the notebook `detect_change` trains it. All are small, of the same size, and judged by
validation photos; no test photo is read. The notebook shows the stored curves and scores.
"""

import sys
from dataclasses import replace

from torch.utils.data import DataLoader

from src import ProjectError, data
from src.photo_views import make_canvases
from src.run import start
from src.train import Training
from tools.notebooks import definitions, print_anything

SIZES = {
    "cpu": {"image_side": 64, "channels": (16, 32, 64, 128), "epochs": 12, "lr": 3e-3},
    "gpu": {"epochs": 8, "batch_size": 32},  # at the drawn size
}


def main():
    print_anything()
    nb, curves, metrics = definitions("detect_change"), {}, {}
    configs = {profile: replace(nb.DRAWN, **size) for profile, size in SIZES.items()}
    smoke = replace(nb.CONFIGS["smoke"], pool_after=nb.DRAWN.pool_after, dropout=nb.DRAWN.dropout)
    run = start("drawn_network", configs | {"smoke": smoke, "demo": smoke}, data.PHOTOS)
    config, side = run.config, run.config.image_side
    photos = data.photos(run.source, "train", config.photos)
    parts = data.split(photos, 0.1, config.seed)
    kept, held_back = (make_canvases([photos[i] for i in part], side) for part in parts)
    loader = DataLoader(nb.FreshPairs(kept[0].to(run.device), config, side), batch_size=None)
    pairs = nb.FixedPairs(*held_back, nb.both_ranges(config.val_pairs), side, config.seed + 100)
    pooled = replace(config, pool_after=nb.Config.pool_after)
    variants = {"drawn": config, "pooled": pooled, "no_dropout": replace(pooled, dropout=0.0)}
    for name, variant in variants.items():
        network = run.place(nb.build(variant))
        training = Training(
            name,
            network,
            [(network, config.lr)],
            config.epochs * config.steps,
            run,
            weight_decay=config.weight_decay,
            ema_decay=config.ema_decay,
        )
        for _ in training.epochs(config.epochs):
            for first, second, labels, changes in training.bar(loader):
                with run.precision():
                    loss, means = nb.changer_loss(*network(first, second), labels, changes, side)
                training.step(loss, n=len(labels), **means)
            with training.validating():
                logits, validation = nb.evaluate(network, DataLoader(pairs, 100), side, run)
            training.end_epoch(**validation)
        rates = nb.score_labels(logits > 0, pairs.labels, pairs.photos)
        metrics |= {f"{name}.{key}": rate for key, rate in rates.items()}
        curves[name] = training.history
        print(f"{name}: {rates['per_label_accuracy']} of validation labels are right")
    run.save(metrics, [config.seed], curves)


if __name__ == "__main__":
    try:
        main()
    except ProjectError as error:
        sys.exit(f"Error: {error}")
