"""Objects cut out of COCO's photos, the views of them, and the features of these views."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from src import ProjectError, data, datasets

ROOM = 2.8  # side of what is kept of the photo, in sides of a view at zoom 1: for 0.5 and a shift
CONTEXT = 1.25  # side of a view at zoom 1, in longer sides of the object's box
STORED = 2.25  # pixels kept of a crop's side, per pixel of a view's side
GREY = 127  # outside of the photo; EfficientNet-Lite reads it as zero
STRIDES = (8, 16, 32)  # of the feature maps
FIXED_SEEDS = {"val": 100, "test": 200}  # of the views that all networks are scored on


@dataclass
class Crops:
    """Objects of one split with their surroundings.

    Attributes:
        crops: (N, 4, S, S) uint8, RGB and the mask times 255.
        labels, photos: (N,), the photos' ids.
        classes: names.
        left_out: {reason: how many}.
    """

    crops: Tensor
    labels: Tensor
    photos: Tensor
    classes: tuple[str, ...]
    left_out: Counter

    def __getitem__(self, index: Tensor) -> "Crops":
        parts = (self.crops[index], self.labels[index], self.photos[index])
        return Crops(*parts, self.classes, self.left_out)

    def __len__(self) -> int:
        return len(self.labels)


# --- from photos to crops -------------------------------------------------------------------------
def collect(
    split: str,
    source: data.Source,
    config,
    classes: Mapping[str, Sequence[str]],
    why_left_out: Callable,
) -> Crops:
    """Cut out the objects of "train2017" or "val2017" that are used.

    Args:
        config: with `images`, `per_class` and `crop_side`, see the notebook.
        classes: {name: COCO's super-categories}; those without an object are dropped.
        why_left_out: called with (annotation, super-category, category, mask, masks of the other
            objects); gives a reason, or "" where the object is used.

    Raises:
        ProjectError: if a photo is missing or unreadable, or nothing is left.
    """
    images = None if source.is_standin else config.images
    coco, image_path = datasets.load_coco(split, source, images)
    objects, left_out = list_objects(coco, classes, why_left_out)
    if not objects:
        raise ProjectError(f"No object of {split} can be used ({dict(left_out)}).")
    drawn = draw_balanced([name for _, _, name in objects], config.per_class, seed=0)
    objects = [objects[i] for i in drawn]
    found = tuple(name for name in classes if any(name == o[2] for o in objects))
    side = int(STORED * config.crop_side)
    crops = torch.empty(len(objects), 4, side, side, dtype=torch.uint8)
    photo_of, photo = None, None
    for i, (number, annotation, _) in enumerate(objects):
        if number != photo_of:
            photo_of, photo = number, read_photo(image_path(coco.imgs[number]), coco.imgs[number])
        mask = datasets.coco_mask(annotation, *photo.shape[:2])
        crops[i] = cut_out(photo, mask, annotation["bbox"], side)
    labels = torch.tensor([found.index(name) for _, _, name in objects])
    return Crops(crops, labels, torch.tensor([o[0] for o in objects]), found, left_out)


def list_objects(
    coco, classes: Mapping[str, Sequence[str]], why_left_out: Callable
) -> tuple[list[tuple[int, dict, str]], Counter]:
    """List all usable objects (photo, annotation, class), and count the others by reason."""
    class_of = {group: name for name, groups in classes.items() for group in groups}
    objects, left_out = [], Counter()
    for number in sorted(coco.imgs):
        info, annotations = coco.imgs[number], coco.loadAnns(coco.getAnnIds(number))
        masks = [datasets.coco_mask(a, info["height"], info["width"]) for a in annotations]
        for annotation, mask in zip(annotations, masks):
            category = coco.cats[annotation["category_id"]]
            others = [other for other in masks if other is not None and other is not mask]
            name = class_of.get(category["supercategory"])
            reason = why_left_out(annotation, name, category["name"], mask, others)
            if reason:
                left_out[reason] += 1
            else:
                objects.append((number, annotation, name))
    return objects, left_out


def draw_balanced(names: Sequence[str], per_class: int, seed: int) -> list[int]:
    """Draw at most `per_class` of each name at random: sorted indices."""
    rng, names = np.random.default_rng(seed), np.asarray(names)
    drawn = [
        rng.permutation(np.flatnonzero(names == name))[:per_class] for name in sorted(set(names))
    ]
    return sorted(np.concatenate(drawn).tolist()) if drawn else []


def read_photo(path: Path, info: dict) -> np.ndarray:
    """Read a photo (H, W, 3) uint8 as it is stored.

    Raises:
        ProjectError: if it cannot be read, or has not the size that its annotation says.
    """
    # COCO's outlines are those of the stored pixels, whose sizes its annotations name; pycocotools
    # knows of no orientation. COCO's own photos carry none (no EXIF in the 549 of the sample), but
    # a program that rewrote one may have added it, and turning would part it from its outlines.
    with data.opened_image(path) as image:
        photo = np.array(data.as_rgb(image))
    if photo.shape[:2] != (info["height"], info["width"]):
        raise ProjectError(
            f"{path.name} is {photo.shape[1]}x{photo.shape[0]} pixels, its annotation says "
            f"{info['width']}x{info['height']}: the outlines would not fit. Replace the file by "
            "the original."
        )
    return photo


def cut_out(photo: np.ndarray, mask: np.ndarray, box: Sequence[float], side: int) -> Tensor:
    """Cut out the surroundings of one object.

    Args:
        photo, mask: uint8 (H, W, 3) and (H, W), the mask 0 or 1.
        box: left, top, width, height in pixels.
        side: of the result in pixels, for ROOM * CONTEXT of the box's longer side.

    Returns:
        (4, side, side) uint8: RGB, grey outside of the photo, and the mask times 255.
    """
    left, top, width, height = box
    half = ROOM * CONTEXT * max(width, height) / 2
    corner = [round(left + width / 2 - half), round(top + height / 2 - half)]
    length = max(1, round(2 * half))
    layers = np.full((length, length, 4), GREY, dtype=np.uint8)
    layers[..., 3] = 0
    x, y = (
        slice(max(0, c), max(0, min(n, c + length)))
        for c, n in zip(corner, (photo.shape[1], photo.shape[0]))
    )
    part = np.dstack([photo[y, x], 255 * mask[y, x]])
    first_y, first_x = y.start - corner[1], x.start - corner[0]
    layers[first_y : first_y + part.shape[0], first_x : first_x + part.shape[1]] = part
    how = Image.Resampling.BOX if length > side else Image.Resampling.BILINEAR
    resized = [
        np.array(Image.fromarray(kind).resize((side, side), how))
        for kind in (layers[..., :3], layers[..., 3])
    ]
    return torch.from_numpy(np.dstack(resized)).permute(2, 0, 1)


def split_photos(found: Crops, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Hold photos back for validation, class by class.

    A photo counts for the rarest class of its objects, so that every class is in both parts.

    Returns:
        Indices of the training and of the validation objects; they share no photo.
    """
    counts, rarest = torch.bincount(found.labels), {}
    for label, photo in zip(found.labels.tolist(), found.photos.tolist()):
        rarest[photo] = min(rarest.get(photo, label), label, key=lambda c: (counts[c], c))
    train, _ = data.train_val_split(list(rarest.values()), fraction, seed)
    chosen = torch.isin(found.photos, torch.tensor(list(rarest))[train])
    return chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]


# --- from crops to views --------------------------------------------------------------------------
def draw_numbers(
    n: int, seed: int, angle: float, zoom: tuple[float, float], shift: float
) -> dict[str, Tensor]:
    """Draw what `make_views` asks for: all uniform, the zoom in its logarithm.

    Args:
        angle: degrees either way.
        zoom: least and largest.
        shift: in sides of the view, either way.
    """
    u = torch.rand(5, n, generator=torch.Generator().manual_seed(seed))
    return {
        "angle": angle * (2 * u[0] - 1),
        "zoom": zoom[0] * (zoom[1] / zoom[0]) ** u[1],
        "shift": shift * (2 * u[2:4].t() - 1),
        "mirror": torch.where(u[4] < 0.5, -1.0, 1.0),
    }


def make_views(
    crops: Tensor,
    side: int,
    angle: Tensor,
    zoom: Tensor,
    shift: Tensor,
    mirror: Tensor,
    disc: bool = False,
) -> tuple[Tensor, Tensor]:
    """Look at crops through affine maps.

    Args:
        crops: (N, 4, S, S) uint8, see `cut_out`.
        side: of the views in pixels.
        angle: (N,) degrees clockwise.
        zoom: (N,) factor of the object's size; at 1 its longer side is 1 / CONTEXT of the view's.
        shift: (N, 2), x then y, where the object's centre lies off the view's, in sides.
        mirror: (N,), 1, or -1 to swap left and right before turning.
        disc: whether all outside of the inscribed circle is grey, so that no corner tells an angle.

    Returns:
        images (N, 3, side, side) float in [0, 1], and masks (N, side / 2, side / 2) bool: half the
        resolution is fine enough to say where the object is.
    """
    cos, sin = torch.cos(torch.deg2rad(angle)), torch.sin(torch.deg2rad(angle))
    rows = torch.stack([mirror * cos, mirror * sin], dim=1), torch.stack([-sin, cos], dim=1)
    turn = torch.stack(rows, dim=1) / (zoom * ROOM)[:, None, None]  # view -> crop, (N, 2, 2)
    theta = torch.cat([turn, -turn @ (2 * shift)[..., None]], dim=2)
    grid = F.affine_grid(theta, [len(crops), 4, side, side], align_corners=False)
    empty = torch.tensor([GREY, GREY, GREY, 0.0], device=crops.device).view(1, 4, 1, 1)
    views = F.grid_sample(crops.float() - empty, grid, align_corners=False)
    if disc:
        axis = (torch.arange(side, device=crops.device) + 0.5) / side * 2 - 1
        views = views * (axis**2 + axis[:, None] ** 2 < 1)
    views = views + empty
    return views[:, :3] / 255, F.avg_pool2d(views[:, 3:], 2)[:, 0] > 127


class FreshViews:
    """Views that are made when they are asked for, on the run's device.

    Args:
        crops: {role: `Crops`}.
        side: of the views in pixels.
        config: with `angle`, `zoom` and `shift`, see the notebook.
    """

    def __init__(self, crops: Mapping[str, Crops], side: int, config, runtime):
        self.crops, self.side, self.config, self.runtime = crops, side, config, runtime

    def _see(self, role: str, index: Tensor, numbers: Mapping[str, Tensor]):
        part, device = self.crops[role], self.runtime.device
        chosen = {name: value.to(device) for name, value in numbers.items()}
        views, masks = make_views(part.crops[index].to(device), self.side, **chosen)
        views = views.contiguous(memory_format=self.runtime.memory_format)
        return views, masks, part.labels[index].to(device)

    def random(self, index: Tensor, epoch: int):
        """Views (B, 3, side, side) of training objects, never the same, their masks and labels."""
        seed, config = int(torch.randint(2**31, ())), self.config
        numbers = draw_numbers(len(index), seed, config.angle, config.zoom, config.shift)
        return self._see("train", index, numbers)

    def fixed(self, role: str) -> Callable:
        """A function of indices that gives upright views, the same each time."""
        n, seed, config = len(self.crops[role]), FIXED_SEEDS[role], self.config
        numbers = draw_numbers(n, seed, 0.0, config.zoom, config.shift)
        return lambda index: self._see(role, index, {k: v[index] for k, v in numbers.items()})

    def digest_parts(self) -> tuple:
        """What a checkpoint knows of them."""
        sums = [float(part.crops[::7, ..., ::5].double().sum()) for part in self.crops.values()]
        return self.side, self.config, sums


# --- from views to features -----------------------------------------------------------------------
@dataclass
class Views:
    """The features of one view of every object, in main memory.

    Attributes:
        levels: feature maps by stride, (N, C, s, s) float16 each, finest first.
        masks: (N, S / 2, S / 2) bool.
        labels, photos: (N,).
    """

    levels: list[Tensor]
    masks: Tensor
    labels: Tensor
    photos: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor, runtime) -> tuple[list[Tensor], Tensor, Tensor]:
        """Give levels (float32), masks and labels of some objects on the run's device."""
        levels = [level[index].to(runtime.device).float() for level in self.levels]
        return levels, self.masks[index].to(runtime.device), self.labels[index].to(runtime.device)

    def digest_parts(self) -> list:
        """What a checkpoint knows of them; all the numbers would take long."""
        parts = (*self.levels, self.masks)
        return [(tuple(x.shape), float(x[::7].double().sum())) for x in parts]


def join(views: Sequence[Views]) -> Views:
    """Join several views of the same objects into one set, view after view."""
    levels = [torch.cat(maps) for maps in zip(*(v.levels for v in views))]
    rest = (torch.cat([getattr(v, k) for v in views]) for k in ("masks", "labels", "photos"))
    return Views(levels, *rest)


@torch.inference_mode()
def extract(
    backbone,
    crops: Crops,
    numbers: Mapping[str, Tensor],
    side: int,
    runtime,
    disc: bool = False,
    size: int = 64,
) -> Views:
    """Compute the features of one view of each crop, `size` at a time."""
    levels, masks = [], []
    for part in torch.arange(len(crops)).split(size):
        chosen = {name: value[part].to(runtime.device) for name, value in numbers.items()}
        images, mask = make_views(crops.crops[part].to(runtime.device), side, **chosen, disc=disc)
        images = images.contiguous(memory_format=runtime.memory_format)
        maps = backbone.feature_maps(images, STRIDES)
        levels.append([m.to("cpu", torch.float16) for m in maps])
        masks.append(mask.cpu())
    joined = (torch.cat(maps) for maps in zip(*levels))
    levels = [m.contiguous(memory_format=torch.channels_last).clone() for m in joined]
    return Views(levels, torch.cat(masks), crops.labels, crops.photos)


def prepare(
    backbone,
    crops: Mapping[str, Crops],
    config,
    runtime,
    angle: float,
    zoom: tuple[float, float],
    disc: bool = False,
) -> dict:
    """Compute all views of an experiment.

    Args:
        crops: of "train", "val" and "test".
        config: with `crop_side`, `views`, `test_views` and `shift`, see the notebook.
        angle, zoom, disc: of the views; without a disc, validation and test views stand upright.

    Returns:
        {"train": a list of `Views`, "val" and "test": one set each}.
    """

    def views(role: str, count: int, seed: int, angle: float) -> list[Views]:
        part = crops[role]
        draws = [draw_numbers(len(part), seed + i, angle, zoom, config.shift) for i in range(count)]
        see = functools.partial(extract, backbone, part, side=config.crop_side, runtime=runtime)
        return [see(numbers, disc=disc) for numbers in draws]

    fixed = angle if disc else 0.0
    return {"train": views("train", config.views, 0, angle)} | {
        role: join(views(role, config.test_views, seed, fixed))
        for role, seed in FIXED_SEEDS.items()
    }


# --- masks ----------------------------------------------------------------------------------------
def enlarge(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate maps (..., s, t) bilinearly to (..., *size).

    As two matrix products, whose gradient is the same from run to run on every device.
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    rows, columns = (_resampling(n, m, maps) for n, m in zip(maps.shape[-2:], size))
    return rows @ maps @ columns.t()


def _resampling(size: int, wanted: int, like: Tensor) -> Tensor:
    """The matrix (wanted, size) of linear interpolation between pixel centres."""
    position = (torch.arange(wanted, device=like.device) + 0.5) * size / wanted - 0.5
    position = position.clamp(0, size - 1)[:, None]
    distance = (position - torch.arange(size, device=like.device)).abs()
    return (1 - distance).clamp_min(0).to(like.dtype)


def shrink(masks: Tensor, size: int) -> Tensor:
    """Bring masks (B, S, S) to the resolution of a map: where at least half is inside."""
    return F.adaptive_avg_pool2d(masks[:, None].float(), size)[:, 0] >= 0.5


def mask_iou(found: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union (N,) of masks, both bool (N, S, S); 0 where both are empty."""
    return (found & masks).sum(dim=(1, 2)) / (found | masks).sum(dim=(1, 2)).clamp_min(1)
