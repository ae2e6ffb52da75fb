"""Convolutions in traced graphs: which are carried in int8, with what their normalization is folded into, and what becomes of the rest."""

import collections
from functools import lru_cache

import pytest
import torch
from torch import nn

from qlora_tools.adapters.merged import MergedSource
from qlora_tools.adapters.peft_files import read_adapter
from qlora_tools.errors import NonFiniteError
from qlora_tools.export.schemes import scheme_of
from qlora_tools.export.target import CPU, Target
from qlora_tools.export.traced.convolutions import fold
from qlora_tools.export.traced.export import draw, fill, write_traced
from qlora_tools.export.traced.inputs import Subject, subject_of
from qlora_tools.export.traced.parity import check_traced
from qlora_tools.models.family import family_of
from tests.export.tiny_decoders import MemorySource
from tests.export.traced.tiny_models import Tiny, relative_error, run

RESNET = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"], "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2],
          "id2label": {"0": "a", "1": "b", "2": "c"}}  # fmt: skip


class Net(nn.Module):
    """Every kind of convolution there is."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 7, stride=2, padding=3)
        self.plain = nn.Conv2d(16, 24, 3, padding=1)
        self.strided = nn.Conv2d(24, 32, (3, 2), stride=(2, 1), padding=(1, 0), bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(32, 32, 3, padding="same", dilation=2)
        self.between = nn.Conv2d(32, 32, 1)
        self.shared = nn.Conv2d(32, 32, 1)
        self.turned = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.line = nn.Conv1d(16, 16, 5, stride=2)
        self.both = nn.Conv2d(16, 16, 1)
        self.last = nn.BatchNorm2d(16)

    def forward(self, pixel_values):
        x = torch.relu(self.plain(torch.relu(self.first(pixel_values))))
        x = torch.relu(self.norm(self.strided(x)))
        x = torch.relu(self.between(torch.relu(self.depthwise(x))))
        x = self.dilated(self.grouped(x))
        x = self.turned(self.shared(self.shared(x)))
        seen = self.both(x)  # read twice: by its normalization and beside it
        x = self.last(seen) + seen
        return {"logits": self.line(x.flatten(2))}


def alive(model):
    """Random statistics and gains, some of them negative."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, spread, centre in ((module.weight, 0.7, 0.6), (module.bias, 0.3, 0.0), (module.running_mean, 0.3, 0.0)):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * spread + centre)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) * 2 + 0.3)
    return model.eval().requires_grad_(False)


def net_subject():
    def build(dtype):
        return Net().to(dtype)

    def inputs(size):
        shape = ((2, 3, 20, 24), (1, 3, 26, 16))[size]
        return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(size))}

    return Subject("image-classification", build, inputs, {"pixel_values": {0: "batch_size", 2: "height", 3: "width"}}, ("logits",))


@lru_cache
def tiny(name):
    config, subject = (RESNET, subject_of(RESNET)) if name == "resnet" else ({}, net_subject())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = alive(subject.build(torch.float32))
    source = MemorySource({key: value.clone() for key, value in model.state_dict().items()})
    return Tiny(config, model, source, subject, draw(subject, source, config))


def kinds(export):
    return collections.Counter(node.op_type for node in export.graph.graph)


@pytest.mark.parametrize("biased", [False, True])
def test_folding_equals_a_normalization_behind_the_convolution(biased):
    convolution, norm = nn.Conv2d(6, 8, 3, bias=biased).double(), alive(nn.Sequential(nn.BatchNorm2d(8, eps=1e-3)))[0].double()
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    bias = convolution.bias if biased else torch.zeros(8)
    factor, shift = fold(bias, norm.weight, norm.bias, norm.running_mean, norm.running_var, epsilon=1e-3)
    folded = torch.nn.functional.conv2d(x, convolution.weight * factor[:, None, None, None], shift)
    assert torch.allclose(folded, norm(convolution(x)), atol=1e-12)


@pytest.mark.parametrize("name", ["resnet", "net"])
@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4"])
def test_graph_agrees_with_torch_at_both_sizes(name, scheme, tmp_path):
    model = tiny(name)
    export = model.export(scheme, tmp_path)
    for size in (0, 1):
        found, expected = run(tmp_path, model.subject.draw(size)), model.answers(size)
        assert relative_error(found["logits"], expected["logits"]) < {"fp32": 1e-5, "int8": 0.03, "int4": 0.03}[scheme]
    assert check_traced(export, model.source, tmp_path).error_carried < {"fp32": 1e-5, "int8": 0.02, "int4": 0.02}[scheme]


def test_int8_takes_what_goes_through_a_matrix_and_leaves_the_rest():
    export = fill(tiny("net").drawn, tiny("net").source, scheme_of("int8"))
    assert [one.weight for one in export.convolutions] == ["plain.weight", "strided.weight", "dilated.weight", "both.weight", "line.weight"]
    assert [one.norm is not None for one in export.convolutions] == [False, True, False, False, False]
    found = kinds(export)
    assert found["MatMulIntegerToFloat"] == 5 and found["Conv"] == 6 and found["ConvTranspose"] == 1 and found["BatchNormalization"] == 1
    stored = {spec.name for spec in export.plan.outputs}
    assert {"strided.weight", "strided.weight.scale", "strided.weight.zero", "strided.weight.bias"} <= stored
    assert not {"norm.weight", "norm.running_var"} & stored and {"last.weight", "last.running_var"} <= stored


def test_every_normalization_of_a_residual_network_is_folded_but_the_first():
    export = fill(tiny("resnet").drawn, tiny("resnet").source, scheme_of("int8"))
    found = kinds(export)
    assert found["MatMulIntegerToFloat"] + found["Conv"] == 12
    assert found["BatchNormalization"] == found["Conv"]
    assert all(min(one.shape[:2]) >= 16 and one.norm is not None for one in export.convolutions)
    dense = fill(tiny("resnet").drawn, tiny("resnet").source, scheme_of("fp32"))
    assert export.file_bytes < dense.file_bytes and not dense.convolutions


def test_one_input_is_rounded_once_for_all_its_convolutions():
    export = fill(tiny("resnet").drawn, tiny("resnet").source, scheme_of("int8"))
    assert len(export.convolutions) == 8 and kinds(export)["DynamicQuantizeLinear"] == 7  # a shortcut reads what the first of its stage reads


def test_plain_onnx_spells_the_same_product_without_foreign_operators(tmp_path):
    model, target = tiny("net"), Target(standard=True)
    export = fill(draw(model.subject, model.source, model.config, target), model.source, scheme_of("int8", target))
    write_traced(export, model.source, tmp_path)
    assert {node.domain for node in export.graph.graph} == {""} and kinds(export)["MatMulInteger"] == 5
    assert relative_error(run(tmp_path, model.subject.draw(1))["logits"], model.answers(1)["logits"]) < 0.03


def test_an_adapter_on_convolutions_is_merged_on_the_way(tmp_path):
    import peft

    model = tiny("resnet")
    live = alive(model.subject.build(torch.float32))
    live.load_state_dict(model.source.tensors)
    wrapped = peft.get_peft_model(live, peft.LoraConfig(r=4, target_modules=["convolution"], init_lora_weights=False)).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = MergedSource(model.source, [(read_adapter(tmp_path / "adapter", model.source.specs, family_of(RESNET)), 1.0)])
    write_traced(fill(model.drawn, merged, scheme_of("int8")), merged, tmp_path)
    pixels = model.subject.draw(0)
    with torch.no_grad():
        expected = wrapped.merge_and_unload()(**pixels).logits.numpy()
    assert relative_error(run(tmp_path, pixels)["logits"], expected) < 0.03
    assert relative_error(expected, model.answers(0)["logits"]) > 0.1


@pytest.mark.parametrize("name", ["strided.weight", "norm.running_var", "norm.weight"])
def test_a_value_that_is_not_finite_is_refused_by_name(name, tmp_path):
    model = tiny("net")
    tensors = {key: value.clone() for key, value in model.source.tensors.items()}
    tensors[name].view(-1)[1] = float("nan")
    with pytest.raises(NonFiniteError, match=name):
        model.export("int8", tmp_path, MemorySource(tensors))


def test_a_variance_below_zero_is_refused(tmp_path):
    model = tiny("net")
    tensors = {key: value.clone() for key, value in model.source.tensors.items()}
    tensors["norm.running_var"][0] = -1
    with pytest.raises(NonFiniteError, match=r"strided\.weight"):
        model.export("int8", tmp_path, MemorySource(tensors))


def test_nothing_is_rounded_for_cuda():
    from qlora_tools.export.traced.convolutions import convolutions_of

    model = tiny("net")
    export = fill(model.drawn, model.source, scheme_of("fp32", CPU))
    assert convolutions_of(export.graph.graph, {}, {}, scheme_of("int8", Target("cuda", "F16"))) == ()
