"""What flows back: second moments of the gradients at every linear's output, of log-likelihood of labels drawn from the model's own predictions.

Drawn from the model and not taken from the text, they give the Fisher information, with which a change of a layer's output moves the
predictions. The forward walk leaves a tape: what each block was called with. The blocks are then run again in reverse order, one block of
weights in memory at a time, each from its own inputs to the gradients of those. What the model does between blocks lies in the graph of its
passage, whose leaves are the blocks' outputs.

Axes: T tokens (all leading axes), V classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_tools.errors import NonFiniteError, UnsupportedError
from qlora_tools.live.parking import map_tensors, tensors_in
from qlora_tools.live.relay import Call

_DRAWN_ROWS = 256


@dataclass
class Step:
    """One batch at one stop: the call and the outputs that were handed on, leaves whose ``grad`` fills up as the later blocks go back."""

    number: int
    call: Call
    outputs: list[torch.Tensor]


@dataclass
class Tape:
    """Steps in the order in which they were taken, grouped by stop."""

    stages: list[tuple[str, list[Step]]] = field(default_factory=list)

    def note(self, path: str, number: int, call: Call, output: Any) -> Any:
        """Take down a step; returns its output made into leaves."""
        leaves = map_tensors(lambda tensor: tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor, output)
        if not self.stages or self.stages[-1][0] != path or any(step.number == number for step in self.stages[-1][1]):
            self.stages.append((path, []))
        self.stages[-1][1].append(Step(number, call, [tensor for tensor in tensors_in(leaves) if tensor.requires_grad]))
        return leaves


def backward_through(step: Step, forward: Callable[..., Any]) -> None:
    """Run the block of ``step`` again, with a graph, and carry the gradients of its outputs to its inputs and on into the graph they came from."""
    if any(leaf.grad is not None for leaf in step.outputs):
        wanted: list[tuple[torch.Tensor, torch.Tensor]] = []

        def cut(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.requires_grad:
                return tensor
            known = next((copy for original, copy in wanted if original is tensor), None)
            if known is None:
                known = tensor.detach().requires_grad_()
                wanted.append((tensor, known))
            return known

        args, kwargs = map_tensors(cut, step.call.args), map_tensors(cut, step.call.kwargs)
        with torch.enable_grad():
            outputs = [tensor for tensor in tensors_in(forward(*args, **kwargs)) if tensor.is_floating_point()]
        pairs = [(output, leaf.grad) for output, leaf in zip(outputs, step.outputs, strict=True) if leaf.grad is not None and output.requires_grad]
        torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
        for leaf in step.outputs:
            leaf.grad = None
        reached = [(original, copy.grad) for original, copy in wanted if copy.grad is not None]
        if reached:
            torch.autograd.backward([original for original, _ in reached], [grad for _, grad in reached])
    step.outputs.clear()


def draw_and_go_back(result: Any, keep: torch.Tensor | None, seed: int) -> None:
    """Draw a label from each row of the model's predictions and send back the gradient of its negative log-likelihood.

    Raises:
        UnsupportedError: the model predicts nothing.
    """
    logits = getattr(result, "logits", None)
    if not isinstance(logits, torch.Tensor) or not logits.requires_grad:
        raise UnsupportedError(f"{type(result).__name__} holds no predictions to draw labels from", hint="leave out --fisher for a model without a head")
    grad = torch.empty_like(logits, dtype=torch.float32, requires_grad=False)
    generator = torch.Generator().manual_seed(seed)
    rows_TV, grad_TV = logits.detach().reshape(-1, logits.shape[-1]), grad.view(-1, logits.shape[-1])
    for start in range(0, len(rows_TV), _DRAWN_ROWS):
        part = slice(start, start + _DRAWN_ROWS)
        p_TV = torch.softmax(rows_TV[part].float(), dim=-1)
        if not bool(torch.isfinite(p_TV.sum())):
            raise NonFiniteError("the model predicts NaN or infinity", hint="check the weights, or compute in another dtype")
        label_T = torch.multinomial(p_TV.cpu(), 1, generator=generator)[:, 0].to(p_TV.device)
        p_TV[torch.arange(len(p_TV), device=p_TV.device), label_T] -= 1
        grad_TV[part] = p_TV
    if keep is not None and keep.shape == logits.shape[:-1]:
        grad[~keep] = 0
    torch.autograd.backward([logits], [grad.to(logits.dtype)])
