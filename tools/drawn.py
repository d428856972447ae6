"""`python -m tools.drawn`: what holds the drawn Changer back? (`make drawn`)

The drawn network has no pooling between its stages and dropout of 0.2. Four small trainings cross
the two, at a quarter of the drawn width and on small images. Validation photos judge; no test photo
is read. The notebook `detect_change` shows the stored result.
"""

import sys
from itertools import product

from src import ROOT, ProjectError, data, datasets, device, provenance, results, settings
from src.views import make_canvases
from tools.notebooks import definitions

NAME, NOTEBOOK = "drawn_network", "detect_change"
SIZE = dict(image_side=64, channels=(16, 32, 64, 128), epochs=4, steps=500)
SMOKE = dict(image_side=32, channels=(4, 8, 12, 16), epochs=2, steps=2, val_pairs=32, photos=8)


def make_pairs(nb, config, source):
    """A loader of fresh training pairs, and fixed validation pairs of each range of strengths."""
    paths = datasets.list_photos("train", source, config.photos, config.seed, minimum_side=64)
    share = 0.1 if len(paths) > 20 else 0.34  # as in the notebook
    train, val = (
        make_canvases([paths[i] for i in part], config.image_side)
        for part in data.split_groups([path.name for path in paths], share, config.seed)
    )
    fixed = {
        name: nb.FixedPairs(*val, config.val_pairs, limits, config.image_side, config.seed + 1)
        for name, limits in {"standard": nb.STANDARD, "subtle": nb.SUBTLE}.items()
    }
    return nb.FreshPairs(train[0], config, config.image_side).loader(), fixed


def score(nb, network, pairs, config, runtime) -> dict[str, results.Metric]:
    """The shares of labels and of pairs that are right, with intervals over photos."""
    logits, *_ = nb.evaluate(network.eval(), pairs.loader(), config, runtime)
    correct = ((logits > 0) == (pairs.labels > 0)).float()
    shares = {"per_label_accuracy": correct.mean(dim=1), "exact_match": correct.amin(dim=1)}
    return {key: results.bootstrap(x.numpy(), pairs.photos.numpy()) for key, x in shares.items()}


def run(size: dict, source, runtime):
    """Train the four networks, store their validation scores, and give the results file's path.

    Args:
        size: fields of the notebook's `Config` that differ from its defaults.
        source: where the photos are.
        runtime: device and precision.
    """
    nb, clock, metrics, curves = definitions(NOTEBOOK), device.Stopwatch(runtime), {}, {}
    size = size | {"small_side": size["image_side"], "small_epochs": 0}
    base = nb.replace(nb.Config(), **size)
    fresh, fixed = make_pairs(nb, base, source)
    loaders = {name: pairs.loader() for name, pairs in fixed.items()}
    for pooled, dropout in product((True, False), (0.0, nb.DRAWN.dropout)):
        pools = base.pool_after if pooled else nb.DRAWN.pool_after
        config = nb.replace(base, pool_after=pools, dropout=dropout)
        network = runtime.place(nb.build(config))
        train_loaders = {config.image_side: fresh}
        name = f"{'pooling' if pooled else 'no_pooling'}_{'dropout' if dropout else 'no_dropout'}"
        curves[name] = nb.train_changer(network, train_loaders, loaders, config, runtime)
        for strength, pairs in fixed.items():
            for key, metric in score(nb, network, pairs, config, runtime).items():
                metrics[f"{name}.{strength}.{key}"] = metric
                print(f"{name}, {strength}, {key}: {metric}")
    return results.save_results(
        NAME,
        metrics,
        profile="trial",
        source=source,
        runtime=runtime,
        seeds=[base.seed],
        seconds=clock.lap(),
        config=base,
        curves=curves,
        fingerprint=provenance.code_fingerprint(ROOT / "notebooks" / f"{NOTEBOOK}.ipynb"),
    )


def main() -> int:
    try:
        chosen = settings.read()
        runtime = device.start(device.choose_device(chosen.device), "cpu")
        place = dict(folder=chosen.data, mirror=chosen.mirror)
        source = data.find_source(datasets.PHOTOS, chosen.profile, **place)
        size = SMOKE if chosen.profile == "smoke" else SIZE
        print(f"wrote {run(size, source, runtime).relative_to(ROOT)}")
    except ProjectError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
