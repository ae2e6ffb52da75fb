"""Losses in chunks against the model's own logits, whole, in fp32 and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from qlora_tools.training import loss as module
from qlora_tools.training.loss import IGNORED, LanguageLoss, label_loss
from qlora_tools.training.rows import Batch

VOCAB = 61
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)).eval()


def softcapped() -> Any:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5, sliding_window=16)).eval()


def scaled() -> Any:
    torch.manual_seed(0)
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)).eval()


def biased() -> Any:
    model = llama()
    model.lm_head = nn.Linear(32, VOCAB)
    return model


class _Squared(LlamaForCausalLM):
    def forward(self, *inputs: Any, **named: Any) -> Any:
        out = super().forward(*inputs, **named)
        out.logits = out.logits + 0.1 * out.logits.square()
        return out


class _Reshaped(LlamaForCausalLM):
    def forward(self, *inputs: Any, **named: Any) -> Any:
        out = super().forward(*inputs, **named)
        out.logits = out.logits.reshape(*out.logits.shape[:-1], VOCAB)  # no other width is taken
        return out


def squared(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return _Squared(LlamaConfig(**SMALL)).eval()


def reshaped() -> Any:
    torch.manual_seed(0)
    return _Reshaped(LlamaConfig(**SMALL)).eval()


def frozen_head(model: Any) -> Any:
    """The layers learn, the head does not: as under LoRA."""
    model.get_output_embeddings().requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    return model


def batch(rows: int = 3, length: int = 9, share: float = 0.6) -> Batch:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
    targets = torch.randint(0, VOCAB, (rows, length), generator=generator)
    targets[torch.rand(rows, length, generator=generator) > share] = IGNORED
    return Batch({"input_ids": ids}, targets, int((targets != IGNORED).sum()), ids.numel())


def gradients(model: Any, total: torch.Tensor) -> list[torch.Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(total / 7, parameters))  # any factor, as that of a step


def agree(model: Any, found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(gradients(model, found), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def whole(model: Any, data: Batch) -> torch.Tensor:
    return functional.cross_entropy(model(**data.inputs).logits.flatten(0, 1), data.targets.flatten(), reduction="sum", ignore_index=IGNORED)


BUILDS: dict[str, tuple[Callable[[], Any], bool]] = {
    "llama": (llama, True),
    "gpt2, tied": (gpt2, True),
    "head with a bias": (biased, True),
    "softcapped": (softcapped, True),
    "scaled": (scaled, True),
    "more behind the head": (squared, False),
    "a width behind the head": (reshaped, False),
}


@pytest.mark.parametrize("chunk", [1, 16, 17, 1000])
@pytest.mark.parametrize("build", BUILDS)
def test_chunks_are_the_whole_cross_entropy(build: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "chunks_of", lambda count, width: [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)])
    make, splits = BUILDS[build]
    model, data = frozen_head(make()), batch()
    loss = LanguageLoss(model)
    assert loss._head.splits is splits and loss._head.plain is (build in ("llama", "gpt2, tied", "head with a bias"))
    found, correct = loss(model, data)
    assert correct is None and found.dtype == torch.float32
    agree(model, found, whole(model, data))


@pytest.mark.parametrize("build", ["llama", "softcapped"])
def test_a_head_that_learns_gets_its_gradient(build: str) -> None:
    model, data = BUILDS[build][0](), batch()
    loss = LanguageLoss(model)
    assert not loss._head.plain
    agree(model, loss(model, data)[0], whole(model, data))


def test_the_frozen_head_agrees_with_float64() -> None:
    hidden = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    weight, bias = torch.randn(VOCAB, 12, dtype=torch.float64), torch.randn(VOCAB, dtype=torch.float64)
    targets = torch.arange(20)
    exact = hidden.clone().requires_grad_()
    expected = functional.cross_entropy(exact @ weight.T + bias, targets, reduction="sum")
    (expected * 0.3).backward()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        narrow = hidden.to(dtype).requires_grad_()
        found = module._FrozenHeadCrossEntropy.apply(narrow, weight.to(dtype), bias.to(dtype), targets)
        (found * 0.3).backward()
        assert abs(float(found.detach()) - float(expected.detach())) <= tolerance * float(expected.detach())
        assert float((narrow.grad.double() - exact.grad).norm()) <= tolerance * float(exact.grad.norm())  # type: ignore[union-attr]


def test_the_factor_of_a_step_is_not_rounded() -> None:
    hidden, weight = torch.randn(4, 8).bfloat16(), torch.randn(VOCAB, 8).bfloat16()

    def gradient(factor: float) -> torch.Tensor:
        leaf = hidden.clone().requires_grad_()
        (module._FrozenHeadCrossEntropy.apply(leaf, weight, None, torch.arange(4)) * factor).backward()
        return leaf.grad.float()  # type: ignore[union-attr]

    assert torch.equal(gradient(1.003), (gradient(1.0) * 1.003).bfloat16().float())


@pytest.mark.parametrize("build", ["llama", "softcapped", "more behind the head"])
def test_without_targets_the_loss_and_its_gradient_are_zero(build: str) -> None:
    model, data = frozen_head(BUILDS[build][0]()), batch(share=0.0)
    assert data.count == 0
    found, _ = LanguageLoss(model)(model, data)
    assert float(found.detach()) == 0.0
    found.backward()
    assert all(float(parameter.grad.abs().sum()) == 0 for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("build", BUILDS)
def test_evaluation_gives_the_same_number(build: str) -> None:
    model, data = BUILDS[build][0](), batch()
    with torch.no_grad():
        torch.testing.assert_close(LanguageLoss(model)(model, data)[0], whole(model, data), rtol=1e-6, atol=1e-5)


def test_chunks_cover_every_row_once_and_stay_small() -> None:
    for count in (0, 1, 16, 17, 1000):
        parts = module.chunks_of(count, 1 << 19)
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(count))
        assert all(part.stop - part.start <= 16 for part in parts)
    assert len(module.chunks_of(1000, 100)) == 1


def distilled(student: Any, teacher: Any, data: Batch, weight: float, temperature: float) -> torch.Tensor:
    """The formula, plainly."""
    chosen = data.targets != IGNORED
    logits = student(**data.inputs).logits[chosen]
    guide = teacher(**data.inputs).logits[chosen].detach()
    p = (guide / temperature).softmax(-1)
    divergence = (p * (p.log() - (logits / temperature).softmax(-1).log())).sum()
    return (1 - weight) * functional.cross_entropy(logits, data.targets[chosen], reduction="sum") + weight * temperature**2 * divergence


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (0.3, 2.5), (1.0, 0.7)])
@pytest.mark.parametrize("splits", [(True, True), (False, True), (True, False)])
def test_distillation_is_its_formula(weight: float, temperature: float, splits: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "chunks_of", lambda count, width: [slice(start, min(start + 5, count)) for start in range(0, count, 5)])
    student = frozen_head(llama(1) if splits[0] else squared(1))
    teacher = llama(2) if splits[1] else squared(2)
    data = batch()
    found, _ = LanguageLoss(student, teacher=teacher, teacher_weight=weight, temperature=temperature)(student, data)
    agree(student, found, distilled(student, teacher, data, weight, temperature))


def test_a_teacher_learns_nothing() -> None:
    student, teacher = llama(1), llama(2)  # the teacher's parameters could take a gradient
    LanguageLoss(student, teacher=teacher, temperature=2.0)(student, batch())[0].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student.model.layers[0].mlp.up_proj.weight.grad is not None


def test_a_teacher_like_the_student_adds_nothing() -> None:
    student, data = llama(1), batch()
    with torch.no_grad():
        found = LanguageLoss(student, teacher=llama(1), teacher_weight=0.25)(student, data)[0]
        torch.testing.assert_close(found, 0.75 * whole(student, data), rtol=1e-6, atol=1e-5)


def test_an_exception_inside_leaves_the_head_as_it_was() -> None:
    model, data = llama(), batch()
    loss = LanguageLoss(model)
    before = model.lm_head.forward
    model.model.norm.register_forward_hook(_explode)
    with pytest.raises(ZeroDivisionError):
        loss(model, data)
    assert "forward" not in vars(model.lm_head) and model.lm_head.forward == before
    model.lm_head.forward = lambda hidden: hidden  # somebody else's replacement is put back, too
    own = model.lm_head.forward
    with pytest.raises(ZeroDivisionError):
        loss(model, data)
    assert model.lm_head.forward is own


def _explode(*_: Any) -> None:
    raise ZeroDivisionError


def test_the_probe_leaves_the_mode_of_the_model() -> None:
    for training in (True, False):
        model = llama().train(training)
        LanguageLoss(model)
        assert model.training is training and model.model.layers[0].training is training


def test_whole_logits_never_exist_where_the_head_splits() -> None:
    model, data = frozen_head(llama()), batch()
    loss, widths = LanguageLoss(model), []
    model.register_forward_hook(lambda module, inputs, output: widths.append(output.logits.shape[-1]))
    loss(model, data)[0].backward()
    assert widths == [1]


def test_class_labels_come_with_their_hits() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.5, 0.1, 0.2]]).bfloat16()
    targets = torch.tensor([0, 2, 0])
    data = Batch({"x": torch.zeros(3)}, targets, 3, 3)
    total, correct = label_loss(lambda x: type("Out", (), {"logits": logits}), data)
    expected = sum(float(torch.logsumexp(row, 0) - row[target]) for row, target in zip(logits.double(), targets, strict=True))
    assert float(total) == pytest.approx(expected, rel=1e-6) and correct is not None and int(correct) == 2
