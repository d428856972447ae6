"""Objects cut out of COCO's photos, views of them, the features of these views, and masks."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from src import ProjectError

ROOM = 2.8  # side of what is kept of the photo, in sides of a view at zoom 1: for 0.5 and a shift
CONTEXT = 1.25  # side of a view at zoom 1, in longer sides of the object's box
STORED = 2.25  # pixels kept of a crop's side, per pixel of a view's side
GRAY = 127  # outside of the photo; EfficientNet-Lite reads it as zero


@dataclass
class Objects:
    """N objects with their surroundings; `photos` are ids, (N,) as the labels."""

    crops: Tensor  # (N, 4, S, S) uint8: RGB, and the mask times 255
    labels: Tensor
    photos: Tensor

    def __getitem__(self, index):
        return Objects(self.crops[index], self.labels[index], self.photos[index])

    def __len__(self):
        return len(self.labels)


@dataclass
class Views:
    """Feature maps of N views, in main memory."""

    maps: list[Tensor]  # (N, C, s, s) float16 each, finest first
    masks: Tensor  # (N, S / 2, S / 2) bool
    labels: Tensor
    photos: Tensor

    def __len__(self):
        return len(self.labels)

    def batch(self, index, device):
        """Maps (a list, float32), masks and labels of some views, on a device."""
        maps = [level[index].to(device).float() for level in self.maps]
        return maps, self.masks[index].to(device), self.labels[index].to(device)


# --- from photos to objects -----------------------------------------------------------------------
def collect(coco, paths, labels, why_left_out, per_class, side):
    """Cut out the objects that are used, at most `per_class` of a label, drawn at random.

    Gives `Objects`, sorted by photo, and {reason: how many are left out}; a ProjectError if all.

    Args:
        coco, paths: annotations (a pycocotools `COCO`) and {image id: file}.
        labels: {COCO's super-category: label}.
        why_left_out: called with (annotation, category, mask (H, W), masks of all objects of the
            photo); gives a reason, or "" where the object is used.
        side: of the views in pixels that the crops are meant for.
    """
    usable, left_out, chosen, photo_id = [], Counter(), [], None
    for number in sorted(paths):
        annotations = coco.loadAnns(coco.getAnnIds(number))
        masks = [coco.annToMask(annotation) for annotation in annotations]
        for annotation, mask in zip(annotations, masks):
            category = coco.cats[annotation["category_id"]]
            reason = why_left_out(annotation, category, mask, masks)
            if reason:
                left_out[reason] += 1
            else:
                usable.append((number, annotation, labels[category["supercategory"]]))
    for i in draw_balanced([label for *_, label in usable], per_class):
        number, annotation, label = usable[i]
        mask = coco.annToMask(annotation)
        if number != photo_id:
            photo_id, photo = number, read_stored(paths[number], mask.shape)
        if photo is None:
            left_out["unreadable photo, or of another size"] += 1
            continue
        chosen.append((cut_out(photo, mask, annotation["bbox"], int(STORED * side)), label, number))
    if not chosen:
        raise ProjectError(f"No object of {len(paths)} photos can be used: use more or others.")
    crops, *numbers = zip(*chosen)
    return Objects(torch.stack(crops), *map(torch.tensor, numbers)), left_out


def draw_balanced(labels, per_class):
    """Draw at most `per_class` of each label at random: sorted indices."""
    order, labels = np.random.default_rng(0).permutation(len(labels)), np.array(labels)
    return sorted(i for c in set(labels) for i in order[labels[order] == c][:per_class])


def read_stored(path, size):
    """A photo (H, W, 3) uint8 as it is stored; None if it is unreadable or not of this size."""
    # COCO's outlines are those of the stored pixels, whose sizes its annotations name; pycocotools
    # knows of no orientation. COCO's own photos carry none (no EXIF in the 549 of the sample), but
    # a program that rewrote one may have added it, and turning would part it from its outlines.
    try:
        with Image.open(path) as image:
            photo = np.array(image.convert("RGB"))
    except Exception:  # Pillow raises many kinds for a damaged file
        return None
    return photo if photo.shape[:2] == size else None


def cut_out(photo, mask, box, side):
    """The surroundings of one object, ROOM * CONTEXT of its box's longer side: (4, side, side).

    From a photo (H, W, 3) uint8, a mask (H, W) of 0 and 1, and a box: left, top, width, height.
    """
    left, top, width, height = box
    half = ROOM * CONTEXT * max(width, height) / 2
    length = max(1, round(2 * half))
    corner = round(half - left - width / 2), round(half - top - height / 2)  # of the photo
    layers = []
    for pixels, outside in ((photo, (GRAY, GRAY, GRAY)), (255 * mask, 0)):
        image = Image.fromarray(pixels)
        canvas = Image.new(image.mode, (length, length), outside)
        canvas.paste(image, corner)
        layers.append(np.array(canvas.resize((side, side), Image.BILINEAR)))
    return torch.from_numpy(np.dstack(layers)).permute(2, 0, 1)


# --- from objects to views ------------------------------------------------------------------------
def draw_poses(n, seed, angle, zoom, shift):
    """Poses (n, 5) for `make_views`, uniform: the angle and the shift either way, log(zoom)."""
    turn, size, x, y, side = np.random.default_rng(seed).uniform(-1, 1, (5, n))
    zooms = np.sqrt(zoom[0] * zoom[1]) * (zoom[1] / zoom[0]) ** (size / 2)
    poses = np.stack([angle * turn, zooms, shift * x, shift * y, np.sign(side)], axis=1)
    return torch.from_numpy(poses).float()


def make_views(crops, poses, side, disc=False):
    """Look at crops (N, 4, S, S), see `cut_out`, through affine maps, in one resampling.

    Gives images (N, 3, side, side) in [0, 1], and masks (N, side / 2, side / 2) bool: half the
    resolution is fine enough to say where the object is.

    Args:
        poses: (N, 5): angle, degrees clockwise; zoom, a factor of the object's size, whose longer
            side is 1 / CONTEXT of the view's at 1; shift to the right and down, in sides of the
            view; and 1, or -1 to swap left and right before turning.
        disc: whether all outside of the inscribed circle is gray, so that no corner tells an angle.
    """
    angle, zoom, *_, mirror = poses.t()
    angle, scale = torch.deg2rad(angle), zoom * ROOM  # from the view to the crop
    cos, sin = angle.cos() / scale, angle.sin() / scale
    turn = torch.stack([mirror * cos, mirror * sin, -sin, cos], dim=1).view(-1, 2, 2)
    theta = torch.cat([turn, -2 * turn @ poses[:, 2:4, None]], dim=2)
    grid = F.affine_grid(theta, [len(crops), 4, side, side], align_corners=False)
    layers = crops.float()
    layers[:, :3] -= GRAY  # so that all outside of the crop, zero, becomes gray
    views = F.grid_sample(layers, grid, align_corners=False)
    if disc:
        axis = torch.linspace(1 / side - 1, 1 - 1 / side, side, device=crops.device)
        views = views * (axis**2 + axis[:, None] ** 2 < 1)
    return (views[:, :3] + GRAY) / 255, F.avg_pool2d(views[:, 3], 2) > 127


@torch.no_grad()  # not inference mode: probes are fitted to what it gives
def see(features, objects, poses, side, device, disc=False):
    """Compute the features of views: one of every object, then the next one of every object.

    `features` gives a list of maps of images (B, 3, side, side), finest first; `poses`, see
    `make_views`, are a whole number of times as many as the objects.
    """
    maps, masks, views = [], [], len(poses) // len(objects)
    for index in torch.arange(len(poses)).split(64):
        crops = objects.crops[index % len(objects)].to(device)
        images, inside = make_views(crops, poses[index].to(device), side, disc)
        images = images.contiguous(memory_format=torch.channels_last)
        maps.append([level.to("cpu", torch.float16) for level in features(images)])
        masks.append(inside.cpu())
    maps = [torch.cat(levels) for levels in zip(*maps)]
    return Views(maps, torch.cat(masks), objects.labels.repeat(views), objects.photos.repeat(views))


# --- masks ----------------------------------------------------------------------------------------
def enlarge(maps, size):
    """Interpolate maps (..., s, t) bilinearly; as matrix products, so that gradients repeat."""
    rows, columns = (
        F.interpolate(torch.eye(n)[None], m, mode="linear")[0].to(maps)
        for n, m in zip(maps.shape[-2:], size)
    )
    return rows.t() @ maps @ columns


def shrink(masks, size):
    """Bring masks (N, S, S) to the resolution of a map: where at least half is inside."""
    return F.adaptive_avg_pool2d(masks.float(), size) >= 0.5


def mask_iou(predicted, masks):
    """Intersection over union (N,) of masks, both bool (N, S, S); 0 where both are empty."""
    union = (predicted | masks).sum(dim=(1, 2)).clamp_min(1)
    return (predicted & masks).sum(dim=(1, 2)) / union


def mean_mask(masks):
    """The mean of masks (N, S, S), cut at the level that suits them best: (S, S) bool."""
    cut = [masks.float().mean(dim=0) > level for level in torch.linspace(0.05, 0.6, 12).tolist()]
    return max(cut, key=lambda mask: float(mask_iou(mask[None], masks).mean()))


def filled_box(masks):
    """The tight box of every mask (N, S, S), filled; empty where the mask is."""
    boxes = torch.zeros_like(masks)
    for box, mask in zip(boxes, masks):
        if mask.any():
            rows, columns = mask.nonzero().t()
            box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    return boxes
