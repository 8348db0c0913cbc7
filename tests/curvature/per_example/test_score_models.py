"""Scores of ready-made models against one ordinary backward pass an example."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import relative_error
from torch import Tensor, nn

from entropic_fast.curvature import fisher_trace, gradient_norms, score_gram, score_matrix
from entropic_fast.objective import Objective

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def settled(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In evaluation mode, as after training: no parameter or statistic at its initial value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim < 2 or "token" in name else 0.01
            parameter.add_(scale * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


def single_passes(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """One backward pass an example.  # [N, P]

    The example twice, as torch's batch normalization (2.13 and 2.15, CPU) returns a wrong
    gradient for one image alone if the gradient arrives with its channels last.
    """
    parameters, rows = [p for p in model.parameters() if p.requires_grad], []
    for x, y in zip(inputs, targets, strict=True):
        loss = nn.functional.cross_entropy(model(torch.stack([x, x])), torch.stack([y, y]))
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def assert_scores(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    dtype = next(model.parameters()).dtype
    # Near a kink rounding decides the side, so the oracle of float32 is float64.
    expected = single_passes(model.double(), inputs.double(), targets)
    obj = Objective(model.to(dtype), "cross_entropy", (inputs, targets), batch_size=2)
    tolerance = TOLERANCE[dtype]
    assert relative_error(score_matrix(obj), expected) < tolerance
    gram = expected @ expected.T
    assert relative_error(score_gram(obj), gram) < 2 * tolerance
    assert relative_error(gradient_norms(obj), gram.diagonal()) < 2 * tolerance
    assert fisher_trace(obj).value == pytest.approx(
        float(gram.trace()) / len(gram), rel=2 * tolerance
    )


def images(size: int, channels: int = 3, examples: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(examples, channels, size, size), torch.randint(0, 10, (examples,))


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# -- transformers --------------------------------------------------------------------------


class VisionTransformer(nn.Module):
    """Patches, a class token and positions as raw parameters, two layers, a final norm."""

    def __init__(self, batch_norm: bool = False, look: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norm: nn.Module = nn.BatchNorm2d(16) if batch_norm else nn.Identity()
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.positions = nn.Parameter(torch.zeros(1, 17, 16))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                16, 4, 32, batch_first=True, norm_first=True, activation="gelu"
            )
            for _ in range(2)
        )
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 10)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 16, 16]
        x = self.norm(self.patches(x)).flatten(2).transpose(1, 2)
        if self.look and float(x.detach().sum()) > 1e9:  # no tracer gets past this
            x = x * 2
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.last(x[:, 0]))


class LanguageModel(nn.Module):
    """Causal, with the output tied to the embedding; scores of every next token."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.position = nn.Embedding(10, 8), nn.Parameter(torch.zeros(6, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        # Nested tensors are for padding masks, and there is none.
        self.body = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:  # [N, T] -> [N, 10, T]
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        x = self.body(self.table(tokens) + self.position, mask=mask)
        return (x @ self.table.weight.T).transpose(1, 2)


@both_dtypes
def test_vision_transformer(dtype: torch.dtype):
    x, y = images(16, examples=5)
    assert_scores(settled(VisionTransformer(), dtype), x.to(dtype), y)


@both_dtypes
def test_language_model_with_a_tied_embedding(dtype: torch.dtype):
    tokens = torch.randint(0, 10, (5, 6))
    model = settled(LanguageModel(), dtype)
    expected = single_passes(model.double(), tokens, tokens.roll(-1, 1))
    obj = Objective(model.to(dtype), "cross_entropy", (tokens, tokens.roll(-1, 1)), batch_size=3)
    assert relative_error(score_matrix(obj), expected) < TOLERANCE[dtype]


@both_dtypes
def test_encoder_and_decoder(dtype: torch.dtype):
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
            self.head = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x, x[:, :3]).mean(1))

    x, y = torch.randn(5, 4, 8, dtype=dtype), torch.randint(0, 10, (5,))
    assert_scores(settled(Translator(), dtype), x, y)


class Attends(nn.Module):
    def __init__(self, cross: bool, calls: int, **options: Any) -> None:
        super().__init__()
        sizes = {"kdim": 5, "vdim": 3} if cross else {}
        self.attention = nn.MultiheadAttention(8, 2, **sizes, **options)
        self.first, self.cross, self.calls = options.get("batch_first", False), cross, calls
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 8]
        h = x if self.first else x.transpose(0, 1)
        for call in range(self.calls):
            k, v = (h[..., :5], h[..., 5:]) if self.cross else (h, h)
            h = h + self.attention(h, k, v, need_weights=call == 1)[0]
        return self.head(h.mean(1 if self.first else 0))


@pytest.mark.parametrize(
    ("cross", "calls", "options"),
    [
        (False, 1, {}),
        (False, 1, {"batch_first": True}),
        (False, 2, {"batch_first": True}),
        (True, 1, {}),
        (True, 1, {"batch_first": True, "bias": False}),
        (True, 2, {"add_bias_kv": True}),
        (False, 1, {"add_zero_attn": True, "batch_first": True}),
    ],
    ids=str,
)
def test_attention_of_every_kind(cross: bool, calls: int, options: dict[str, Any]):
    model = settled(Attends(cross, calls, **options), torch.float64)
    # As many positions as examples, so that a mistaken axis would go unnoticed by its length.
    assert_scores(model, torch.randn(4, 4, 8, dtype=torch.float64), torch.randint(0, 10, (4,)))


# -- convolutional -------------------------------------------------------------------------


class InvertedResidual(nn.Module):
    """MobileNet's block: widen, depthwise, gate (squeeze and excite), narrow."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 3 * channels
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.Hardswish(inplace=True),
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, 4, 1), nn.ReLU(), nn.Conv2d(4, wide, 1)
        )
        self.out = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return x + self.out(h * torch.sigmoid(self.gate(h)))


class ConvNeXtBlock(nn.Module):
    """A depthwise 7x7, then per-pixel linear layers with the channels last, and a layer scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = (
            nn.Linear(channels, 4 * channels),
            nn.Linear(4 * channels, channels),
        )
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.scale * self.narrow(nn.functional.gelu(self.wide(h)))
        return x + h.permute(0, 3, 1, 2)


class SmallUNet(nn.Module):
    """Down, up by a transposed convolution, and the skip concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.InstanceNorm2d(8, affine=True))
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.head = nn.Conv2d(12, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(torch.cat([h, self.up(torch.tanh(self.down(h)))], 1)).mean((2, 3))


def stem_and(block: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        block(8),
        block(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


@both_dtypes
@pytest.mark.parametrize(
    "make",
    [lambda: stem_and(InvertedResidual), lambda: stem_and(ConvNeXtBlock), SmallUNet],
    ids=["inverted residuals", "ConvNeXt blocks", "U-Net"],
)
def test_convolutional_blocks(make: Callable[[], nn.Module], dtype: torch.dtype):
    x, y = images(12)
    assert_scores(settled(make(), dtype), x.to(dtype), y)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [32, 64])
def test_resnet18_of_torchvision(size: int, layout: torch.memory_format):
    torchvision = pytest.importorskip("torchvision")
    model = settled(torchvision.models.resnet18(num_classes=10), torch.float64)
    x, y = images(size, examples=3 if size == 32 else 2)
    assert_scores(model.to(memory_format=layout), x.double().contiguous(memory_format=layout), y)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "vit_b_16"])
def test_other_models_of_torchvision(name: str):
    models = pytest.importorskip("torchvision").models
    if name == "vit_b_16":  # the class, at a size for a test
        model = models.VisionTransformer(16, 4, 2, 4, 24, 32, num_classes=10)
        x, y = images(16)
    else:
        model = getattr(models, name)(num_classes=10)
        x, y = images(32, examples=2)
    assert_scores(settled(model, torch.float64), x.double(), y)


# -- torch's batch normalization -----------------------------------------------------------


@pytest.mark.parametrize("look", [False, True], ids=["traceable", "untraceable"])
@pytest.mark.parametrize("examples", [1, 2, 3])
def test_one_image_before_batch_norm_and_positions(examples: int, look: bool):
    """Where torch's own backward pass of a single image is wrong, ours is not."""
    model = settled(VisionTransformer(batch_norm=True, look=look), torch.float64)
    x, y = images(16, examples=examples)
    assert_scores(model, x.double(), y)


def test_the_gradient_of_one_image_before_batch_norm_and_positions():
    """Against a difference of losses, along a random direction."""
    model = settled(VisionTransformer(batch_norm=True), torch.float64)
    x, y = images(16, examples=3)
    obj = Objective(model, "cross_entropy", (x.double(), y), batch_size=2)  # a last batch of one
    theta, step = obj.parameters_vector(), 1e-5
    direction = torch.randn_like(theta)
    difference = obj.loss(theta + step * direction) - obj.loss(theta - step * direction)
    assert float(obj.gradient() @ direction) == pytest.approx(difference / (2 * step), rel=1e-7)
