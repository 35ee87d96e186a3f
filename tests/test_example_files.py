"""The programs under examples/ run, each on a small stand-in for the library that it is for."""

import importlib.util
import subprocess
import sys
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from places import ROOT
from torch import nn

from heads import Detector

FILES = sorted((ROOT / "examples").glob("*.py"))
BATCH = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
TARGET = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def example(name: str):
    """One of the programs as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stir(dyhead: nn.Module) -> None:
    """Let a fresh DyHead sample off its grid: while the offsets are 0, some of its gradients are, too."""
    for block in dyhead.blocks:
        nn.init.normal_(block.spatial.offset.weight, std=0.1)


def assert_all_train(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    # A dynamic ReLU may give single channels of a bias nothing; a parameter without any gradient is a loose end.
    idle = [name for name, parameter in module.named_parameters() if not parameter.grad.any()]
    assert not idle


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_says_how_it_is_run(file):
    assert f"python examples/{file.name}" in file.read_text().split('"""')[1]
    assert len(file.read_text().splitlines()) <= 130


# Three levels behind a stride of 32, two of them odd, as a multiple of 32 that is none of 64 makes them.
YOLO_SIZES = ((16, 24), (8, 12), (4, 6)), ((20, 28), (10, 14), (5, 7))


@pytest.mark.parametrize("sizes", YOLO_SIZES, ids=["even", "odd"])
def test_yolo_three_levels_of_different_channels(sizes):
    yolo = example("yolo_dyhead")
    neck = yolo.DyHeadNeck((24, 40, 72), hidden=32, depth=2)
    stir(neck.dyhead)
    pyramid = [torch.rand(2, c, *size) for c, size in zip((24, 40, 72), sizes, strict=True)]
    maps = neck(pyramid)
    assert [tuple(x.shape) for x in maps] == [(2, 32, *size) for size in sizes]
    sum(x.square().sum() for x in maps).backward()
    assert_all_train(neck)


@pytest.mark.parametrize("between", [(), (16, False)], ids=["channels-alone", "channels-last"])
def test_yolo_detect_takes_what_old_and_new_forks_give_it(between):
    yolo = example("yolo_dyhead")

    class Newer(yolo.Detect):
        def __init__(self, nc, reg_max, end2end, ch):
            super().__init__(nc, ch)
            self.reg_max = reg_max

    if between:
        # The fork's own class in the place of the stand-in.
        yolo.DyHeadDetect.__bases__ = (Newer,)
    detect = yolo.DyHeadDetect(3, 16, 1, *between, (8, 24))
    assert getattr(detect, "reg_max", None) == (between[0] if between else None)
    pyramid = [torch.rand(1, 8, 8, 8), torch.rand(1, 24, 4, 4)]
    found = detect(pyramid)
    behind = yolo.Detect.forward(detect, detect.neck(pyramid))
    assert all(torch.equal(x, y) for x, y in zip(found, behind, strict=True))
    assert [tuple(x.shape) for x in found] == [(1, 67, 8, 8), (1, 67, 4, 4)]
    assert len(detect.boxes) == 2 and detect.boxes[0].in_channels == 16


@pytest.mark.parametrize("hidden", [72, 40, 8])
def test_yolo_other_channels_are_refused_in_words(hidden):
    with pytest.raises(ValueError, match=f"channels must be a multiple of 16.*got {hidden}"):
        example("yolo_dyhead").DyHeadNeck((24, 40, 72), hidden)


def test_yolo_as_a_program_learns(capsys):
    example("yolo_dyhead").main()
    predictions, loss = capsys.readouterr().out.splitlines()
    assert predictions == "predictions (1, 67, 16, 20) (1, 67, 8, 10) (1, 67, 4, 5)"
    first, last = (float(word) for word in loss.removeprefix("loss ").split(" -> "))
    assert last < first / 2


class Pyramid(nn.Module):
    """Called as torchvision's backbones with a pyramid are: named maps, finest first, and `out_channels`."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        self.out_channels = 32
        self.convolution = nn.Conv2d(3, 32, 4, 4)

    def forward(self, x):
        maps = [self.convolution(x)]
        for _ in self.names[1:]:
            maps.append(F.max_pool2d(maps[-1], 1, 2))
        return OrderedDict(zip(self.names, maps, strict=True))


class Counting(nn.Module):
    """What a torchvision detector does with its backbone: it gives the maps, by name, to heads of its own."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(backbone.out_channels, 3, 1)

    def forward(self, x):
        return OrderedDict((name, self.head(y)) for name, y in self.backbone(x).items())


@pytest.mark.parametrize("names", [("0", "1", "2", "3", "pool"), ("0", "1", "2", "p6", "p7")])
def test_torchvision_names_and_order_stay(names):
    tv = example("torchvision_detector")
    plain = Pyramid(names)
    detector = tv.add_dyhead(Counting(plain), depth=2)
    stir(detector.backbone.dyhead)
    assert detector.backbone.out_channels == 32 and detector.backbone.pyramid is plain
    before, found = plain(BATCH), detector.backbone(BATCH)
    assert isinstance(found, OrderedDict) and list(found) == list(names)
    assert [x.shape for x in found.values()] == [x.shape for x in before.values()]
    for name, x in zip(names, detector.backbone.dyhead(list(before.values())), strict=True):
        torch.testing.assert_close(found[name], x)
    out = detector(BATCH)
    assert list(out) == list(names)
    sum(x.square().sum() for x in out.values()).backward()
    assert_all_train(detector)


def test_torchvision_as_a_program(monkeypatch, capsys):
    """The whole of `main`, with a detector in torchvision's calling convention."""

    class Losses(Counting):
        def forward(self, images, targets):
            out = super().forward(torch.stack(images))
            return {"classification": out["0"].square().mean(), "bbox_regression": out["p7"].square().mean()}

    def retinanet_resnet50_fpn(weights, weights_backbone, min_size, max_size, num_classes):
        return Losses(Pyramid(("0", "1", "2", "p6", "p7")))

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchvision.models", SimpleNamespace())
    detection = SimpleNamespace(retinanet_resnet50_fpn=retinanet_resnet50_fpn)
    monkeypatch.setitem(sys.modules, "torchvision.models.detection", detection)
    example("torchvision_detector").main()
    losses, gradient = capsys.readouterr().out.splitlines()
    assert losses.startswith("{'classification': ") and float(gradient.rpartition(" ")[2]) > 0


class Body(nn.Module):
    """Called as timm's `features_only` models are: a list of maps, and `feature_info` of each."""

    def __init__(self, strides, output_fmt="NCHW"):
        super().__init__()
        self.strides, self.output_fmt = strides, output_fmt
        channels = [8 + 4 * number for number in range(len(strides))]
        self.stages = nn.ModuleList(nn.Conv2d(3, c, s, s) for c, s in zip(channels, strides, strict=True))
        self.feature_info = SimpleNamespace(reduction=lambda: list(strides), channels=lambda: channels)
        self.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "interpolation": "bicubic"}

    def forward(self, x):
        maps = [stage(x) for stage in self.stages]
        return [x.movedim(1, 3) for x in maps] if self.output_fmt == "NHWC" else maps


# As timm's ResNets, its ConvNeXts and its Swins say it.
BODIES = {"five": ((2, 4, 8, 16, 32), "NCHW"), "four": ((4, 8, 16, 32), "NCHW"), "behind": ((4, 8, 16, 32), "NHWC")}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_timm_maps_are_found_by_stride(body):
    backbone = example("timm_pyramid").TimmBackbone(Body(*body))
    maps = backbone(BATCH)
    assert [tuple(x.shape[2:]) for x in maps] == [(8, 12), (4, 6), (2, 3)]
    assert tuple(x.shape[1] for x in maps) == backbone.channels


def test_timm_without_the_strides_is_refused_in_words():
    with pytest.raises(ValueError, match=r"strides 8, 16 and 32; its maps have \[16, 16, 16\]"):
        example("timm_pyramid").TimmBackbone(Body((16, 16, 16)))


def test_timm_a_detector_learns():
    model = example("timm_pyramid").build(Body((4, 8, 16, 32)), num_classes=3, channels=32, depth=1)
    assert isinstance(model, Detector)
    assert model.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3]) and model.std[2] == pytest.approx(0.1)
    stir(model.trunk)
    images = list(BATCH)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = sum(model(images, [TARGET, TARGET]).values())
        loss.backward()
        optimiser.step()
        if not losses:
            assert_all_train(model.trunk)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert len(model.eval()(images)) == 2


def test_timm_as_a_program(monkeypatch, capsys):
    made = []
    timm = SimpleNamespace(create_model=lambda *a, **k: made.append((a, k)) or Body((2, 4, 8, 16, 32)))
    monkeypatch.setitem(sys.modules, "timm", timm)
    example("timm_pyramid").main("resnet18")
    assert made == [(("resnet18",), {"features_only": True})]
    channels, losses, found = capsys.readouterr().out.splitlines()
    assert channels == "channels (16, 20, 24)" and "'loss_centerness'" in losses and "'boxes'" in found


@pytest.mark.parametrize("name", ["torchvision_detector", "timm_pyramid"])
def test_a_missing_library_is_said_in_a_line(name):
    hidden = "import sys; sys.modules['torchvision'] = sys.modules['timm'] = None; sys.argv = ['example']; "
    code = f"{hidden}import runpy; runpy.run_path('examples/{name}.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("this example needs ")
