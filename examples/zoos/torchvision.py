"""torchvision: the smallest member of every family, at the image size that it was made for."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model

CLASSIFICATION = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
    mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5
    squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_16 wide_resnet50_2
    """.split()
SEGMENTATION = "deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large".split()
VIDEO = "mc3_18 mvit_v1_b mvit_v2_s r2plus1d_18 r3d_18 s3d swin3d_t".split()
DETECTION = """
    fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn keypointrcnn_resnet50_fpn
    maskrcnn_resnet50_fpn retinanet_resnet50_fpn ssd300_vgg16 ssdlite320_mobilenet_v3_large
    """.split()
FLOW = ["raft_small"]

OPTIONS: dict[str, dict[str, Any]] = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
SIZE = {"inception_v3": 299}


def image(name: str) -> Tensor:
    return torch.randn(2, 3, size := SIZE.get(name, 224), size)


def clip(name: str) -> Tensor:
    size = 224 if name.startswith(("mvit", "s3d")) else 112
    return torch.randn(2, 3, 16, size, size)


def images(name: str) -> tuple[list[Tensor]]:
    """Of two sizes, as detection networks take them."""
    return ([torch.rand(3, 240, 320), torch.rand(3, 256, 256)],)


def frames(name: str) -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, 128, 128) * 2 - 1, torch.rand(2, 3, 128, 128) * 2 - 1


FAMILIES: dict[Callable[[str], Any], list[str]] = {
    image: [*CLASSIFICATION, *SEGMENTATION], clip: VIDEO, images: DETECTION, frames: FLOW,
}  # fmt: skip


def build(name: str, inputs: Callable[[str], Any]) -> tuple[nn.Module, Any]:
    options = {"weights": None, "weights_backbone": None} if name in (*SEGMENTATION, *DETECTION) else {"weights": None}
    if inputs is images:
        options |= {"min_size": 256, "max_size": 320} if "ssd" not in name else {}
    return get_model(name, **options, **OPTIONS.get(name, {})), inputs(name)


def networks() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    return {name: partial(build, name, inputs) for inputs, names in FAMILIES.items() for name in names}
