"""Models of `transformers` and `timm` as they come, against two backward passes of torch.

Small ones of their classes, with weights at random: language models with masks on either side,
padding that does not count, caches on; image models at 32 x 32 pixels.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from entropic_fast.curvature import (
    GGNOperator,
    HessianOperator,
    autograd_only,
    gradient_norms,
    hessian_trace,
    score_gram,
    score_matrix,
)
from entropic_fast.curvature.per_example._engine import PerExampleGradEngine
from entropic_fast.objective import Objective

pytestmark = pytest.mark.slow

VOCABULARY, EXAMPLES, TOKENS, CLASSES = 40, 4, 6, 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Case(NamedTuple):
    model: nn.Module
    loss: Any
    batch: Any
    losses: Callable[[Tensor], Tensor]  # of each example from the outputs, by torch alone
    rounding: float = 1e-11


def import_or_skip(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def tokens(padding: str) -> dict[str, Tensor]:
    """A batch: padding on the "right" or "left" of two examples, "no padding", or "no mask"."""
    ids = torch.randint(3, VOCABULARY, (EXAMPLES, TOKENS))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 4:] = mask[3, 2:] = 0
    elif padding == "left":
        mask[1, :2] = mask[3, :3] = 0
    batch = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}
    return batch if padding == "no mask" else {**batch, "attention_mask": mask}


def next_token(batch: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    labels = batch["labels"][:, 1:]

    def losses(scores: Tensor) -> Tensor:
        terms = F.cross_entropy(scores[:, :-1].mT, labels, reduction="none", ignore_index=-100)
        return terms.sum(1) * len(labels) / (labels != -100).sum()

    return losses


def causal(kind: str, padding: str, **settings: Any) -> Case:
    tf = import_or_skip("transformers")
    config = getattr(tf, f"{kind}Config")
    if kind == "GPT2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2}
        sizes |= {"n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
        name = "GPT2LMHeadModel"
    else:
        sizes, name = SIZES, f"{kind}ForCausalLM"
    batch = tokens(padding)
    # Llama and its kin normalize in float32 whatever the model's dtype.
    rounding = 1e-11 if kind.startswith("GPT") else 2e-6
    model = getattr(tf, name)(config(**sizes, **settings))
    return Case(model, "next_token", batch, next_token(batch), rounding)


def summed(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores.mT, labels, reduction="none", ignore_index=-100).sum(1)


def masked() -> Case:
    """The losses of the tokens to be filled in, summed to an example's."""
    tf = import_or_skip("transformers")
    batch = tokens("right")
    batch["labels"] = batch["input_ids"].masked_fill(torch.rand(EXAMPLES, TOKENS) < 0.6, -100)
    batch["token_type_ids"] = (torch.arange(TOKENS) > 2).long().repeat(EXAMPLES, 1)
    model = tf.BertForMaskedLM(tf.BertConfig(**SIZES))
    return Case(model, summed, batch, lambda scores: summed(scores, batch["labels"]))


def labeled(model: nn.Module, batch: dict[str, Tensor]) -> Case:
    labels = torch.arange(EXAMPLES) % CLASSES
    return Case(
        model,
        "cross_entropy",
        {**batch, "labels": labels},
        lambda scores: F.cross_entropy(scores, labels, reduction="none"),
    )


def classifier() -> Case:
    tf = import_or_skip("transformers")
    model = tf.BertForSequenceClassification(tf.BertConfig(num_labels=CLASSES, **SIZES))
    return labeled(model, tokens("right"))


def images(size: int) -> Tensor:
    return torch.randn(EXAMPLES, 3, size, size, dtype=torch.float64)


def vit() -> Case:
    tf = import_or_skip("transformers")
    config = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=16, patch_size=8, num_labels=CLASSES,
    )  # fmt: skip
    return labeled(tf.ViTForImageClassification(config), {"pixel_values": images(16)})


def timm(name: str, **settings: Any) -> Case:
    model = import_or_skip("timm").create_model(name, num_classes=CLASSES, **settings)
    case = labeled(model, {})
    x = images(32)
    return case._replace(batch=(x, case.batch["labels"]))


LLAMA = {"num_key_value_heads": 1}
CASES: dict[str, Callable[[], Case]] = {
    "GPT-2, padding on the right": lambda: causal("GPT2", "right"),
    "GPT-2, padding on the left": lambda: causal("GPT2", "left"),
    "GPT-2, no padding": lambda: causal("GPT2", "no padding"),
    "GPT-2, no mask": lambda: causal("GPT2", "no mask"),
    "GPT-2, eager attention": lambda: causal("GPT2", "left", attn_implementation="eager"),
    "GPT-NeoX": lambda: causal("GPTNeoX", "right"),
    "Llama": lambda: causal("Llama", "right", **LLAMA),
    "Llama, no mask": lambda: causal("Llama", "no mask", **LLAMA),
    "Mistral, sliding window": lambda: causal("Mistral", "left", sliding_window=4, **LLAMA),
    "Qwen2": lambda: causal("Qwen2", "left", tie_word_embeddings=True, **LLAMA),
    "BERT": masked,
    "BERT, classifier": classifier,
    "ViT of transformers": vit,
    "ResNet": lambda: timm("resnet18"),
    "ConvNeXt": lambda: timm("convnext_atto"),
    "EfficientNet": lambda: timm("efficientnet_b0"),
    "ViT of timm": lambda: timm(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2
    ),
}


def built(name: str) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        case = CASES[name]()
        model = case.model.double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases and scales that are 0 or 1e-6 at first
                    parameter += 0.1 * torch.randn_like(parameter)
    return case


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def flat(found: Any, parameters: list[Tensor]) -> Tensor:
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def scores_of(case: Case) -> Tensor:
    if isinstance(case.batch, tuple):
        return case.model(case.batch[0])
    return case.model(**{k: v for k, v in case.batch.items() if k != "labels"}).logits


def by_torch(case: Case, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient, products of Hessian and Gauss-Newton matrix with v, gradients of the examples."""
    parameters = list(case.model.parameters())

    def gradient(of: Tensor, along: Tensor | None = None) -> Tensor:
        found = torch.autograd.grad(of, parameters, along, create_graph=True, allow_unused=True)
        return flat(found, parameters)

    with sdpa_kernel(SDPBackend.MATH):
        scores = scores_of(case)
        losses = case.losses(scores)
        slope = gradient(losses.mean())
        hessian = torch.autograd.grad(slope, parameters, v, retain_graph=True, allow_unused=True)
        rows = torch.stack([gradient(loss).detach() for loss in losses])
        u = torch.zeros_like(scores, requires_grad=True)
        (pushed,) = torch.autograd.grad(gradient(scores, u), u, v)
        leaf = scores.detach().requires_grad_()
        (bend,) = torch.autograd.grad(case.losses(leaf).mean(), leaf, create_graph=True)
        (bent,) = torch.autograd.grad(bend, leaf, pushed)
        gauss_newton = gradient(scores, bent).detach()
    return slope.detach(), flat(hessian, parameters), gauss_newton, rows


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_those_of_torch_and_by_the_graph(name: str):
    case = built(name)
    output = {"output": "logits"} if callable(case.loss) else {}
    obj = Objective(case.model, case.loss, case.batch, **output)
    v = torch.randn(obj.num_params, generator=torch.Generator().manual_seed(1)).double()
    slope, hessian, gauss_newton, rows = by_torch(case, v)
    limit = case.rounding

    operator, other = HessianOperator(obj), GGNOperator(obj)
    assert operator.method == other.method == "graph"
    assert relative(obj.gradient(), slope) < limit
    assert relative(operator @ v, hessian) < limit
    form = operator.quadratic_forms(v[:, None])
    assert abs(float(form) - float(v @ hessian)) < limit * float(v.norm() * hessian.norm())
    assert relative(other @ v, gauss_newton) < limit

    engine = PerExampleGradEngine(obj)
    assert engine.traceable
    small = {n for n, p in obj.split(obj.point(None)).items() if p.numel() <= 40 * 16}
    assert engine.batched <= small  # what is left to copies an example: scales, positions, tokens
    assert relative(score_matrix(obj), rows) < limit
    assert relative(gradient_norms(obj), rows.square().sum(1)) < limit
    assert relative(score_gram(obj), rows @ rows.T) < limit


@pytest.mark.parametrize("name", ["GPT-2, padding on the left", "Llama", "BERT", "ViT of timm"])
def test_traces_are_those_without_the_graph(name: str):
    case = built(name)
    output = {"output": "logits"} if callable(case.loss) else {}
    obj = Objective(case.model, case.loss, case.batch, **output)
    found = hessian_trace(obj, probes=4, seed=0)
    with autograd_only():
        expected = hessian_trace(obj, probes=4, seed=0)
    assert found.value == pytest.approx(expected.value, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["GPT-2, padding on the left", "GPT-2, eager attention", "BERT"])
def test_other_dtypes(name: str, dtype: torch.dtype):
    """Scores of half precision, and products of float32, within their rounding."""
    case = built(name)
    output = {"output": "logits"} if callable(case.loss) else {}
    exact = Objective(case.model.to(dtype).double(), case.loss, case.batch, **output)
    obj = Objective(case.model.to(dtype), case.loss, case.batch, **output)
    limit = 1e-4 if dtype == torch.float32 else 0.1
    assert relative(score_matrix(obj).double(), score_matrix(exact)) < limit
    if dtype == torch.float32:
        v = torch.randn(obj.num_params, generator=torch.Generator().manual_seed(1))
        operator = HessianOperator(obj)
        assert operator.method == "graph"
        assert relative((operator @ v).double(), HessianOperator(exact) @ v.double()) < limit
