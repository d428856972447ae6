"""What profiles `gpu` and `gpu_full` cost on common cards: `python -m tools.estimate`.

No step is computed. The notebooks' networks run once on tensors without numbers, as large as the
profile says, while every operation is watched: its floating-point operations, the bytes that it
reads and writes, the memory that is alive. On a card an operation takes as long as the slowest of
the three: computing, memory traffic, launching. Then each notebook's function below says how often
which step is taken.
"""

import contextlib
import functools
import math
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from src import backbones, fast_sampling, objects, registration, results, views
from tools import notebooks

PROFILES = ("gpu", "gpu_full")
GIGABYTE = 1e9


@dataclass(frozen=True)
class Card:
    """Rates that convolutional networks reach, not the peaks of the data sheet."""

    half: float  # floating-point operations per second in float16 or bfloat16
    single: float  # in float32, without TF32
    bandwidth: float  # bytes per second


CARDS = {  # about a third of the peak rate, about 80 % of the peak bandwidth
    "T4": Card(20e12, 4e12, 250e9),
    "RTX 3060": Card(20e12, 6e12, 290e9),
    "A100": Card(100e12, 12e12, 1250e9),
}
LAUNCH = 12e-6  # seconds between the operations that Python can launch
CONTEXT = 0.8 * GIGABYTE  # on the GPU: CUDA's context, workspaces of its libraries, fragments
PROCESS = 3.0 * GIGABYTE  # main memory: Python, PyTorch with CUDA, matplotlib
BUDGETS = {"minutes on a T4": 60, "GB on the GPU": 10, "GB in main memory": 10}  # of `gpu`
HOST = {"canvas": 0.035, "crop": 0.021, "phase correlation": 0.019}  # seconds each on one core


# --- costs of a step ------------------------------------------------------------------------------
@dataclass
class Cost:
    """Operations (FLOPs, bytes, whether half precision), and the peak of the memory in bytes."""

    operations: list[tuple[float, float, bool]] = field(default_factory=list)
    peak: float = 0.0

    @property
    def flops(self) -> float:
        return sum(flops for flops, _, _ in self.operations)

    def seconds(self, card: Card) -> float:
        return sum(
            max(flops / (card.half if half else card.single), moved / card.bandwidth, LAUNCH)
            for flops, moved, half in self.operations
        )


class Meter(TorchDispatchMode):
    """Watches all operations; under `FakeTensorMode`."""

    def __init__(self):
        super().__init__()
        self.cost, self.alive, self.memory = Cost(), set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not made:  # a question, such as for the device
            return out
        for x in made:
            self.notice(x.untyped_storage())
        known = {x.untyped_storage()._cdata for x in given}
        if not func._schema.is_mutable and made[0].untyped_storage()._cdata in known:
            return out  # a view
        name = func._schema.name.removeprefix("aten::").rstrip("_")  # in place: counts the same
        count = flop_registry.get(getattr(torch.ops.aten, name, None))
        flops = count(*args, **kwargs, out_val=out) if count else 0
        moved = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*given, *made))
        if "embedding_bag" in name:  # reads a row of the table for every index
            moved += args[1].numel() * args[0][0].nbytes
        half = any(x.dtype in (torch.float16, torch.bfloat16) for x in given)
        self.cost.operations.append((flops, moved, half))
        return out

    def notice(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.memory += size
            self.cost.peak = max(self.cost.peak, self.memory)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size) -> None:
        self.alive.discard(key)
        self.memory -= size


@contextlib.contextmanager
def without_numbers(half: bool) -> Iterator[Meter]:
    """Tensors without numbers, in the precision of the profiles for GPUs; gives the meter."""
    as_on_gpu = {"cpu": fast_sampling.BLOCK["other"]}  # the operator's blocks
    precision = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with (
        mock.patch.dict(fast_sampling.BLOCK, as_on_gpu),
        mock.patch.dict(fast_sampling.SAMPLED, as_on_gpu),
        FakeTensorMode(),
        Meter() as meter,
        precision,
    ):
        yield meter


def training_step(build: Callable[[], nn.Module], inputs: Callable, loss: Callable) -> Cost:
    """The cost of one step of AdamW.

    Args:
        build: gives the network.
        inputs: gives its inputs.
        loss: called with the network's output.
    """
    with without_numbers(half=True) as meter:
        network, given = build().train(), inputs()
        meter.cost.operations.clear()  # those that made them
        loss(network(*given)).backward()
    trained = sum(p.nbytes for p in network.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in network.parameters()) - trained
    cost = meter.cost
    cost.operations += [(0, 7 * trained / 8, False)] * 8  # AdamW reads 4 tensors and writes 3
    cost.peak += 2 * trained + 3 * (trained + frozen)  # its moments; the weights that `fit` keeps
    return cost


def forward(build: Callable[[], nn.Module], inputs: Callable, half: bool = True) -> Cost:
    """The cost of an evaluation of one batch."""
    with without_numbers(half) as meter, torch.no_grad():
        network, given = build().eval(), inputs()
        meter.cost.operations.clear()
        network(*given)
    return meter.cost


# --- costs of a notebook --------------------------------------------------------------------------
@dataclass
class Work:
    """All that a notebook does, as far as it takes long.

    Attributes:
        parts: (what, cost of one step, number of steps).
        resident: bytes that stay on the GPU beside the step.
        main_memory: bytes, beside the process.
        host: seconds of work that the CPU does.
        download: (files, megabytes).
    """

    parts: list[tuple[str, Cost, float]]
    resident: float
    main_memory: float
    host: float
    download: tuple[int, float]

    @property
    def flops(self) -> float:
        return sum(cost.flops * times for _, cost, times in self.parts)

    def minutes(self, card: Card) -> float:
        return (self.host + sum(cost.seconds(card) * n for _, cost, n in self.parts)) / 60

    @property
    def gpu_memory(self) -> float:
        return CONTEXT + self.resident + max(cost.peak for _, cost, _ in self.parts)


def parameter_bytes(build: Callable[[], nn.Module]) -> int:
    with FakeTensorMode():
        return sum(p.nbytes for p in build().parameters())


@functools.cache
def module(name: str):
    return notebooks.definitions(name)


def transfer_learning(config) -> Work:
    """Three losses with all labels, the study of few labels, the comparison of triplets."""
    nb, batch, final = module("transfer_learning"), config.batch_size, config.image_sizes[-1]
    val = round(10_000 * config.val_fraction)
    train, test, seeds, methods = 10_000 - val, 2_000, len(config.seeds), 3

    def build():
        return nb.TransferNet(backbones.load_backbone(config.backbone, pretrained=False))

    def images(n, side):
        return lambda: (torch.rand(n, 3, side, side).contiguous(memory_format=torch.channels_last),)

    steps, seen = Counter(), Counter()  # by side: steps of training, images whose features are used
    for side in config.image_sizes:
        steps[side] += methods * seeds * math.ceil(train / batch)
        seen[final] += methods * seeds * val
    seen[final] += (methods * seeds + 1) * test + seeds * (train + val)
    draws = len(config.study_labels) * len(config.study_seeds)
    small = config.study_size
    steps[small] += methods * len(config.study_seeds) * sum(config.study_steps)
    seen[small] += train + test + methods * draws * test
    mining = 4 * len(config.mining_seeds) * config.mining_epochs
    steps[small] += mining * math.ceil(2 * config.mining_labels / batch)
    seen[small] += mining * val // 5
    parts = []
    for side, n in steps.items():
        cost = training_step(build, images(batch, side), lambda out: out.float().square().mean())
        parts.append((f"training steps at {side} pixels", cost, n))
    for side, n in seen.items():
        parts.append((f"images seen at {side} pixels", forward(build, images(100, side)), n / 100))
    networks = (methods * seeds + 1) * parameter_bytes(build)
    data = 12_000 * 3 * 32**2 + train * 2048 * 4
    return Work(parts, networks + data, 3 * data, 60, (1, 170))


def deformable_convolution(config) -> Work:
    """Features of all views twice, the heads, the turned heads, fine-tuning."""
    nb, side, batch = module("deformable_convolution"), config.crop_side, config.batch_size
    found = config.per_class * len(nb.CLASSES)  # at most
    train, val, test = found * (1 - config.val_fraction), found * config.val_fraction, found
    fixed = (val + test) * config.test_views
    seeds, fine = len(config.seeds), len(config.fine_seeds)

    class Extractor(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbones.load_backbone("efficientnet_lite0", pretrained=False)

        def forward(self, x):
            return self.backbone.feature_maps(x, objects.STRIDES)

    with FakeTensorMode(), torch.no_grad():
        maps = Extractor().eval()(torch.rand(1, 3, side, side))
    shapes = [tuple(m.shape[1:]) for m in maps]

    def levels():
        return ([torch.rand(batch, *shape) for shape in shapes],)

    def loss(out, size=side):
        masks = torch.zeros(batch, size // 2, size // 2, dtype=torch.bool)
        labels = torch.zeros(batch, dtype=torch.long)
        return nb.losses(*out, masks, labels)["loss"].mean()

    see = forward(Extractor, lambda: (torch.rand(64, 3, side, side),), half=False)
    views_of_all = 2 * (train * config.views + fixed) + 4 * test
    parts = [("batches of 64 views", see, views_of_all / 64)]
    per_epoch, epochs = math.ceil(train / batch), config.epochs
    for key, variant in nb.VARIANTS.items():
        trainings = seeds * (2 if key in ("ordinary_9", "static_9", "deformable_9") else 1)

        def head(variant=variant):
            return nb.Head(variant, [s[0] for s in shapes], len(nb.CLASSES), config)

        cost = training_step(head, levels, loss)
        parts.append((f"training steps of {key}", cost, trainings * epochs * per_epoch))
        scored = epochs * val * config.test_views + train + fixed
        cost = forward(head, levels, half=False)
        parts.append((f"evaluations of {key}", cost, trainings * scored / batch))
    size, n = config.fine_side, min(config.fine_images, train)
    nb.copy = types.SimpleNamespace(deepcopy=lambda network: network)  # fake tensors have no copy
    updates, scored = fine * config.fine_epochs * n, fine * (config.fine_epochs * val + test)
    for kind in ("ordinary", "dilated", "deformable"):

        def network(kind=kind):
            resnet = backbones.load_backbone("resnet18", pretrained=False)
            return nb.FineTuned(resnet, kind, len(nb.CLASSES))

        def inputs():
            return (torch.rand(batch, 3, size, size),)

        cost = training_step(network, inputs, functools.partial(loss, size=size))
        parts.append((f"fine-tuning, {kind}", cost, updates / batch))
        cost = forward(network, inputs, half=False)
        parts.append((f"its evaluation, {kind}", cost, scored / batch))
    view = 2 * sum(map(math.prod, shapes)) + (side // 2) ** 2
    crops = 4 * int(objects.STORED * side) ** 2 * 2 * found
    stored = 2 * (train * config.views + fixed) * view
    heads = (len(nb.VARIANTS) + 3) * seeds * parameter_bytes(head)
    largest = max(train, test * config.test_views) * view  # a set while it is joined
    host = 2 * found * HOST["crop"]
    photos = 2 * config.images if isinstance(config.images, int) else 549
    return Work(parts, heads, 1.5 * crops + stored + largest, host, (photos, 241 + 0.16 * photos))


def detect_change(config) -> Work:
    """Training on fresh pairs of two sizes, validation, test, and the alignments of section 6."""
    nb, batch, side = module("detect_change"), config.batch_size, config.image_side

    def pairs(n, size):
        return lambda: (torch.rand(n, 3, size, size), torch.rand(n, 3, size, size))

    def loss(out):
        return nb.changer_loss(out, torch.zeros(batch, 3), torch.zeros(batch, 4), side, 1.0)[0]

    def fresh(size):  # sampling and augmentation, in float32
        class Fresh(nn.Module):
            def forward(self, windows, grid):
                points = F.grid_sample(windows, grid, align_corners=False)
                return [nb.augment(half) for half in F.avg_pool2d(points, 2).chunk(2, dim=2)]

        def inputs(window=int(2.2 * side)):
            return torch.rand(batch, 3, window, window), torch.rand(batch, 4 * size, 2 * size, 2)

        return forward(Fresh, inputs, half=False)

    def build():
        return nb.build(config)

    epochs = {config.small_side: config.small_epochs}
    epochs[side] = config.epochs - config.small_epochs
    parts = []
    for size, n in epochs.items():
        cost = training_step(build, pairs(batch, size), loss)
        parts.append((f"training steps at {size} pixels", cost, n * config.steps))
        parts.append((f"fresh pairs at {size} pixels", fresh(size), n * config.steps))
    looks = 2 * config.val_pairs * (config.epochs + 3) + 3 * config.test_pairs * 2
    parts.append(("batches of 100 pairs", forward(build, pairs(100, side)), looks / 100))
    compared = 2 * (config.val_pairs + config.test_pairs)
    for starts, times in ((15, 1), (2, 3)):
        with without_numbers(half=False) as meter, torch.no_grad():
            images = torch.zeros(50, 3, side, side, dtype=torch.uint8)
            registration.align(images, images, torch.zeros(50, starts, 4))
        parts.append((f"alignments from {starts} starts", meter.cost, times * compared / 50))
    photos = 2 * config.photos  # train and test; most are wide enough for two canvases
    canvases = 2 * photos * 3 * (views.CANVAS_PER_SIDE * side) ** 2
    kept = 3 * 2 * (compared + 2 * config.odd_pairs) * side**2
    host = photos * HOST["canvas"] + compared * HOST["phase correlation"]
    networks = 4 * parameter_bytes(build)
    return Work(parts, networks, 1.3 * canvases + kept, host, (2, 1150))


NOTEBOOKS = {f.__name__: f for f in (transfer_learning, deformable_convolution, detect_change)}


@functools.cache
def estimate(name: str, profile: str) -> Work:
    return NOTEBOOKS[name](module(name).CONFIGS[profile])


def main() -> int:
    rows = []
    for name in NOTEBOOKS:
        for profile in PROFILES:
            work = estimate(name, profile)
            files, megabytes = work.download
            memory = work.gpu_memory / GIGABYTE, (PROCESS + work.main_memory) / GIGABYTE
            minutes = [f"{work.minutes(card):.0f}" for card in CARDS.values()]
            numbers = [f"{x:.1f}" for x in (work.flops / 1e15, *memory)]
            rows.append([name, profile, *minutes, *numbers, f"{files} files, {megabytes:.0f} MB"])
    headings = [f"{card}, minutes" for card in CARDS]
    headings = ["notebook", "profile", *headings, "PFLOP", "GB on GPU", "GB in main memory"]
    print(results.table([*headings, "download"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
