"""A replacement that holds the base's own values is left out; one value that differs keeps the module whole."""

from __future__ import annotations

import pytest
import torch

from qlora_tools.adapters import portable_peft
from qlora_tools.adapters.copies import without_copies
from qlora_tools.adapters.portable import Layer, Portable
from qlora_tools.engine import plan
from qlora_tools.models.family import family_of
from qlora_tools.specs import spec_of


class Base:
    """Tensors at hand as a base; ``ties`` as a checkpoint has them."""

    def __init__(self, tensors, ties=None):
        self.tensors, self.ties, self.family = tensors, ties or {}, family_of({"model_type": "llama"})
        self.specs = {name: spec_of(name, tensor) for name, tensor in tensors.items()}
        self.asked = []

    def read(self, name, rows=None):
        self.asked.append(rows)
        return self.tensors[name] if rows is None else self.tensors[name][rows[0] : rows[1]]


HEAD = torch.arange(21.0).reshape(7, 3).bfloat16()
LAYER = Layer(torch.ones(2, 3), torch.ones(7, 2), 1.0)


def left(replacements, base, **more):
    portable = Portable({"lm_head": LAYER}, replacements, **more)
    return without_copies(portable, portable_peft.bound(portable_peft.content(portable), base), base, base.ties)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_is_left_out_whatever_its_dtype_and_that_is_said(dtype):
    found = left({"lm_head.weight": HEAD.to(dtype)}, Base({"lm_head.weight": HEAD}))
    assert not found.replacements and "lm_head.weight" in found.notes[0] and found.layers


def test_a_copy_of_a_tied_tensor_is_compared_with_its_owner():
    base = Base({"model.embed_tokens.weight": HEAD}, {"lm_head.weight": "model.embed_tokens.weight"})
    assert not left({"lm_head.weight": HEAD}, base).replacements


@pytest.mark.parametrize("change", [lambda t: t.index_fill(0, torch.tensor([6]), 1.0), lambda t: torch.cat([t, t[:1]]), lambda t: t * (1 + 2**-20)])
def test_what_differs_in_one_row_in_size_or_in_the_last_bits_stays(change):
    changed = change(HEAD.float())
    assert left({"lm_head.weight": changed}, Base({"lm_head.weight": HEAD})).replacements["lm_head.weight"] is changed


def test_a_module_stays_whole_when_one_of_its_tensors_was_trained():
    base = Base({"lm_head.weight": HEAD, "lm_head.bias": torch.zeros(7)})
    assert left({"lm_head.weight": HEAD, "lm_head.bias": torch.ones(7)}, base).replacements.keys() == {"lm_head.weight", "lm_head.bias"}


def test_nothing_is_left_out_where_both_ends_follow_each_other_or_nothing_would_remain():
    base = Base({"lm_head.weight": HEAD})
    assert left({"lm_head.weight": HEAD}, base, tied=True).replacements
    bare = Portable({}, {"lm_head.weight": HEAD})
    assert without_copies(bare, portable_peft.bound(portable_peft.content(bare), base), base, {}) is bare


def test_large_tensors_are_compared_in_tiles_and_no_further_than_the_first_difference(monkeypatch):
    monkeypatch.setattr("qlora_tools.adapters.copies.row_tiles", lambda spec: plan.row_tiles(spec, tile_bytes=12))
    base = Base({"lm_head.weight": HEAD})
    assert not left({"lm_head.weight": HEAD}, base).replacements and base.asked == [(0, 2), (2, 4), (4, 6), (6, 7)]
    base.asked.clear()
    assert left({"lm_head.weight": HEAD.index_fill(0, torch.tensor([2]), 9.0)}, base).replacements and base.asked == [(0, 2), (2, 4)]
