import math
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional

from experiments.models import Model, ModelName, build_model


def _parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "width", "representation", "embedding"),
    [
        ("small", (1, 8, 8), None, 128, 64),
        ("small", (3, 9, 14), 24, 24, 64),
        ("strided", (1, 28, 28), None, 128, 64),
        ("strided", (3, 9, 14), 24, 24, 64),
        ("mlp", (1, 1, 30), None, 256, 64),
        ("mlp", (3, 5, 4), 20, 20, 64),
        ("mnist-cnn", (1, 28, 28), None, 500, 500),
        ("mnist-cnn", (3, 16, 21), 30, 30, 30),
        ("resnet18", (3, 32, 32), 8, 64, 128),
        ("resnet18", (1, 8, 8), 4, 32, 128),
    ],
)
def test_outputs_with_a_head(
    name: ModelName, shape: tuple[int, int, int], width: int | None, representation: int, embedding: int
) -> None:
    model = build_model(name, shape, width=width).eval()
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    outputs = model.outputs(images)
    assert outputs.representation.shape == (5, representation) and outputs.logits is None
    assert outputs.embedding.shape == (5, embedding)
    assert torch.allclose(outputs.embedding.norm(dim=1), torch.ones(5))
    assert torch.equal(model(images), outputs.embedding)
    assert model.head is not None and model.classifier is None
    assert torch.equal(outputs.embedding, functional.normalize(model.head(outputs.representation), dim=1))


@pytest.mark.parametrize("name", get_args(ModelName))
def test_outputs_with_a_classifier(name: ModelName) -> None:
    model = build_model(name, (1, 28, 28), width=16, n_classes=7).eval()
    outputs = model.outputs(torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert model.head is None and isinstance(model.classifier, nn.Linear)
    assert outputs.logits is not None and outputs.logits.shape == (5, 7)
    assert torch.equal(outputs.logits, model.classifier(outputs.representation))
    assert torch.equal(outputs.embedding, functional.normalize(outputs.representation, dim=1))


@pytest.mark.parametrize(
    ("name", "shape", "width", "encoder", "head"),
    [
        ("small", (1, 8, 8), None, 320 + 18496 + 36928 + 2 * 160 + 64 * 4 * 128 + 3 * 128, 16512 + 256 + 8256),
        ("strided", (1, 28, 28), None, 160 + 4640 + 18496 + 2 * 112 + 64 * 16 * 128 + 3 * 128, 16512 + 256 + 8256),
        ("mlp", (1, 1, 30), None, 30 * 256 + 256 * 256 + 2 * 3 * 256, 65792 + 512 + 16448),
        ("mnist-cnn", (1, 28, 28), None, 520 + 25050 + 400500, 2 * 250500),
        ("resnet18", (3, 32, 32), None, 11_168_832, 512 * 513 + 513 * 128),  # 11,173,962 with a classifier of 10
        # batch norms; stem; stages of 4 convolutions of 9 w^2, the first of each halving a third of it, and a shortcut
        (
            "resnet18",
            (1, 8, 8),
            2,
            2 * 2 * (1 + 4 + 2 * 5 + 4 * 5 + 8 * 5) + 18 + 4 * (36 + (4 + 16 + 64) * (9 * 3.5 + 0.5)),
            16 * 17 + 17 * 128,
        ),
    ],
)
def test_parameter_counts(
    name: ModelName, shape: tuple[int, int, int], width: int | None, encoder: int, head: int
) -> None:
    model = build_model(name, shape, width=width)
    assert (_parameters(model.encoder), _parameters(model.head), _parameters(model.classifier)) == (encoder, head, 0)


def test_small_network_starts_as_it_did_in_version_0_1() -> None:
    torch.manual_seed(3)
    convolutions = [(nn.Conv2d(a, b, 3, s, 1), nn.BatchNorm2d(b)) for a, b, s in ((1, 32, 1), (32, 64, 2), (64, 64, 2))]
    encoder = nn.Sequential(
        *(layer for pair in convolutions for layer in (*pair, nn.ReLU())),
        *(nn.Flatten(), nn.Linear(64 * 4, 128), nn.BatchNorm1d(128), nn.ReLU()),
    )
    head = nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64))
    torch.manual_seed(3)
    model = build_model("small", (1, 8, 8))
    expected = Model(encoder, head, None)
    assert str(model) == str(expected)
    for (name, value), (other, wanted) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other and torch.equal(value, wanted)


def test_strided_network_halves_the_image_three_times_and_the_mlp_has_two_layers() -> None:
    def kinds(module: nn.Module) -> list[str]:
        return [type(layer).__name__ for layer in module.children()]

    strided, mlp = build_model("strided", (1, 28, 28)), build_model("mlp", (1, 1, 5))
    layers = [layer for layer in strided.encoder.children() if isinstance(layer, nn.Conv2d)]
    assert [(layer.out_channels, layer.stride) for layer in layers] == [(16, (2, 2)), (32, (2, 2)), (64, (2, 2))]
    convolutional, dense = ["Conv2d", "BatchNorm2d", "ReLU"], ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds(strided.encoder) == [*3 * convolutional, "Flatten", *dense]
    assert kinds(mlp.encoder) == ["Flatten", *dense, *dense]
    for model in (strided, mlp):
        assert model.head is not None and kinds(model.head) == [*dense, "Linear"]


def test_mnist_network_layer_by_layer() -> None:
    model = build_model("mnist-cnn", (1, 28, 28)).eval()
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    first, second, full = (layer for layer in model.encoder.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
    x = functional.max_pool2d(functional.relu(first(images)), 2)
    x = functional.max_pool2d(functional.relu(second(x)), 2)
    assert x.shape == (2, 50, 4, 4)
    assert torch.allclose(model.encoder(images), functional.relu(full(x.flatten(1))))


def test_resnet_halves_the_image_three_times_and_starts_with_he_weights() -> None:
    torch.manual_seed(0)
    encoder = build_model("resnet18", (3, 32, 32), width=16).encoder.eval()
    images = torch.rand(2, 3, 32, 32)
    shapes: list[tuple[int, ...]] = []
    for module in encoder.children():
        module.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:])))
    encoder(images)
    stages = [(16, 32, 32)] * 2, [(32, 16, 16)] * 2, [(64, 8, 8)] * 2, [(128, 4, 4)] * 2
    assert shapes == [*[(16, 32, 32)] * 3, *(shape for stage in stages for shape in stage), (128, 1, 1), (128,)]
    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 20 and all(layer.bias is None for layer in convolutions)
    for layer in convolutions:
        fan_out = layer.out_channels * layer.kernel_size[0] ** 2
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)


def test_residual_blocks_add_their_input() -> None:
    blocks = list(build_model("resnet18", (3, 8, 8), width=4).encoder.eval().children())[3:-2]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for block in blocks:
        residual, shortcut = block.get_submodule("residual"), block.get_submodule("shortcut")
        *_, last = (module for module in residual.modules() if isinstance(module, nn.BatchNorm2d))
        assert torch.equal(block(x), functional.relu(residual(x) + shortcut(x)))
        nn.init.zeros_(last.weight)
        expected = functional.relu(shortcut(x))
        assert isinstance(shortcut, nn.Identity) == (expected.shape == x.shape)
        assert torch.equal(block(x), expected)
        x = expected


@pytest.mark.parametrize("n_classes", [None, 3])
def test_autocast_keeps_the_embedding_in_float32(n_classes: int | None) -> None:
    model = build_model("mnist-cnn", (1, 28, 28), n_classes=n_classes)
    images = torch.rand(9, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.outputs(images)
    assert outputs.representation.dtype == torch.bfloat16
    assert outputs.embedding.dtype == torch.float32
    assert torch.allclose(outputs.embedding.norm(dim=1), torch.ones(9), atol=1e-6)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="15 x 28 are too small for mnist-cnn, which needs 16 x 16: use the model sma"):
        build_model("mnist-cnn", (1, 15, 28))
    with pytest.raises(ValueError, match="small convolves images, but features have no neighbours: use the model mlp"):
        build_model("small", (1, 1, 28))
    with pytest.raises(ValueError, match="width is 0: give at least 1, or None"):
        build_model("small", (1, 8, 8), width=0)
    with pytest.raises(ValueError, match="n_classes is -2: give at least 1, or None"):
        build_model("resnet18", (1, 8, 8), n_classes=-2)
