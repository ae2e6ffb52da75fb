"""Traced graphs against transformers' own models, in ONNX Runtime."""

import collections
import copy
from dataclasses import replace

import onnx
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from peft import LoraConfig, get_peft_model

from qlora_tools.engine import plan
from qlora_tools.errors import CheckFailed, IncompatibleError, MissingError, NonFiniteError, UnsupportedError, UsageError
from qlora_tools.export.schemes import scheme_of
from qlora_tools.export.traced import parity
from qlora_tools.export.traced.export import fill, plan_traced, write_traced
from qlora_tools.export.traced.inputs import Subject
from qlora_tools.export.traced.names import stored_names
from qlora_tools.export.traced.parity import check_traced
from qlora_tools.export.traced.trace import build, trace
from qlora_tools.progress import SILENT
from qlora_tools.quant.nf4 import NF4
from qlora_tools.verbs.merging import open_merged
from tests.export.tiny_decoders import MemorySource
from tests.export.traced.tiny_models import CONFIGS, relative_error, run, tiny

BOUNDS = {"fp32": 1e-5, "int8": 0.03, "int4": 0.4}


@pytest.mark.parametrize("scheme", BOUNDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_graph_agrees_with_transformers_at_both_sizes(name, scheme, tmp_path):
    model = tiny(name)
    export = model.export(scheme, tmp_path)
    for size in (0, 1):
        found, expected = run(tmp_path, model.subject.draw(size)), model.answers(size)
        assert list(found) == list(expected) == list(export.output_names)
        for output, reference in expected.items():
            assert relative_error(found[output], reference) < BOUNDS[scheme]
    checked = check_traced(export, model.source, tmp_path)
    assert checked.error_carried < {"fp32": 1e-5, "int8": 0.03, "int4": 0.05}[scheme]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_names_and_axes_are_those_that_optimum_opens():
    signature = {name: ([value.name for value in tiny(name).drawn.traced.model.graph.inputs], list(tiny(name).drawn.traced.outputs)) for name in CONFIGS}
    tokens = ["input_ids", "attention_mask"]
    assert signature == {
        "bert": ([*tokens, "token_type_ids"], ["logits"]),
        "bert-mlm": ([*tokens, "token_type_ids"], ["logits"]),
        "distilbert": (tokens, ["logits"]),
        "vit": (["pixel_values"], ["logits"]),
        "t5": (tokens, ["last_hidden_state"]),
    }
    ids = tiny("bert").drawn.traced.model.graph.inputs[0]
    assert [str(axis) for axis in ids.shape] == ["batch_size", "sequence_length"]
    assert {name: tiny(name).subject.task for name in ("bert", "bert-mlm", "vit", "t5")} == {
        "bert": "text-classification",
        "bert-mlm": "fill-mask",
        "vit": "image-classification",
        "t5": "feature-extraction",
    }


def test_every_weight_has_the_form_its_use_asks_for(tmp_path):
    model = tiny("bert")
    forms = {weight.name: type(weight.form).__name__ for weight in fill(model.drawn, model.source, scheme_of("int8")).weights.values() if weight.form}
    assert forms["bert.encoder.layer.0.intermediate.dense.weight"] == "Digits"
    assert forms["bert.encoder.layer.0.attention.self.query.weight"] == "Blocks"
    assert forms["bert.embeddings.word_embeddings.weight"] == "Blocks"
    assert not {"classifier.weight", "bert.embeddings.position_embeddings.weight"} & set(forms)  # three rows, and a small table
    int4 = fill(model.drawn, model.source, scheme_of("int4"))
    assert {weight.name: weight.form for weight in int4.weights.values()}["bert.embeddings.word_embeddings.weight"].bits == 8
    model.export("int4", tmp_path)
    nodes = collections.Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node)
    assert nodes["GatherBlockQuantized"] == 1 and nodes["MatMulNBits"] == 7 and nodes["Gemm"] == 1
    assert nodes["Attention"] == 1 and "Softmax" not in nodes


def test_a_tied_table_is_stored_once(tmp_path):
    model = tiny("bert-mlm")
    export = model.export("int4", tmp_path)
    names = [spec.name for spec in export.plan.outputs]
    assert sum("word_embeddings" in name for name in names) == 2 and not any("decoder.weight" in name for name in names)
    assert export.file_bytes == (tmp_path / "model.onnx.data").stat().st_size


def test_float_graphs_hold_no_transposed_weights(tmp_path):
    model = tiny("vit")
    model.export("fp32", tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    stored = {item.name for item in graph.initializer}
    assert not [node.name for node in graph.node if node.op_type == "Transpose" and node.input[0] in stored]
    assert not any(node.metadata_props for node in graph.node)


class Watched(MemorySource):
    """A source that counts the bytes it has given out at once, and refuses to give more than a tensor at a time."""

    def read(self, name, rows=None):
        self.reads = [*getattr(self, "reads", []), (name, rows)]
        return super().read(name, rows)


def test_planning_reads_no_weight_and_writing_reads_each_once(tmp_path):
    model = tiny("vit")
    source = Watched(model.source.tensors)
    plan_traced(source, model.config, "int4")
    assert not getattr(source, "reads", [])
    model.export("int4", tmp_path, source)
    names = [name for name, _ in source.reads]
    assert len(names) == len(set(names)) and set(names) <= set(source.specs)


def test_large_weights_are_read_in_tiles(monkeypatch, tmp_path):
    monkeypatch.setattr(plan.row_tiles, "__defaults__", (1 << 16, 1))
    model = tiny("bert")
    source = Watched(model.source.tensors)
    model.export("int4", tmp_path, source)
    assert max(4 * source.tensors[name][slice(*rows) if rows else slice(None)].numel() for name, rows in source.reads) <= 1 << 16
    assert relative_error(run(tmp_path, model.subject.draw(0))["logits"], model.answers(0)["logits"]) < BOUNDS["int4"]


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model, first, second = tiny("distilbert"), tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        model.export("int8", folder)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in ("model.onnx", "model.onnx.data"))


def test_older_names_and_missing_prefixes_find_their_weights(tmp_path):
    model = tiny("bert")
    older = {
        name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in model.source.tensors.items()
    }
    export = fill_again(model, older)
    assert {weight.name for weight in export.weights.values()} == set(older)
    write_traced(export, MemorySource(older), tmp_path)
    assert relative_error(run(tmp_path, model.subject.draw(0))["logits"], model.answers(0)["logits"]) < BOUNDS["fp32"]


def test_adapters_are_merged_on_the_way(tmp_path):
    model = tiny("bert")
    tuned = get_peft_model(copy.deepcopy(model.model), LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value", "dense"]))
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.model.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "adapter")
    (tmp_path / "graph").mkdir()
    merged = open_merged(tmp_path / "base", [(tmp_path / "adapter", 1.0)], None, NF4(), SILENT)
    export = model.export("int8", tmp_path / "graph", merged.source)
    with torch.inference_mode():
        expected = tuned(**model.subject.draw(1)).logits.numpy()
    assert relative_error(model.answers(1)["logits"], expected) > 0.05
    assert relative_error(run(tmp_path / "graph", model.subject.draw(1))["logits"], expected) < BOUNDS["int8"]
    assert check_traced(export, merged.source, tmp_path / "graph").error_carried < BOUNDS["int8"]


def test_parity_finds_a_wrong_byte(tmp_path):
    model = tiny("t5")
    export = model.export("fp32", tmp_path)
    data = bytearray((tmp_path / "model.onnx.data").read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    (tmp_path / "model.onnx.data").write_bytes(data)
    with pytest.raises(CheckFailed, match="last_hidden_state"):
        check_traced(export, model.source, tmp_path)


def test_parity_leaves_alone_what_lies_in_the_folder(tmp_path):
    model, folder, elsewhere = tiny("t5"), tmp_path / "export", tmp_path / "elsewhere"
    folder.mkdir()
    export = model.export("fp32", folder)
    elsewhere.write_text("the user's")
    (folder / "parity.onnx").symlink_to(elsewhere)
    before = sorted(path.name for path in folder.iterdir())
    check_traced(export, model.source, folder)
    assert elsewhere.read_text() == "the user's" and (folder / "parity.onnx").is_symlink()
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    "error", [RuntimeError("negative dimension"), ZeroDivisionError("by zero"), StopIteration(), StrictDataclassFieldValidationError("eps", TypeError("x"))]
)
def test_whatever_a_class_raises_about_its_config_is_one_refusal(error):
    def explode(dtype):
        raise error

    subject = replace(tiny("t5").subject, build=explode)
    with pytest.raises(UnsupportedError, match=r"builds no model from this config\.json") as raised:
        build(subject)
    assert raised.value.hint
    error = MissingError("the subject knows better")
    with pytest.raises(MissingError, match="knows better"):
        build(subject)


def test_a_model_too_large_is_checked_on_its_first_layers(monkeypatch, tmp_path):
    monkeypatch.setattr(parity, "WHOLE_BYTES", 0)
    monkeypatch.setattr(parity, "_KEPT_LAYERS", 1)
    model = tiny("vit")
    found = check_traced(model.export("int8", tmp_path), model.source, tmp_path)
    assert found.shortened and found.error_carried < 0.03


def test_weights_that_do_not_fit_are_named():
    model = tiny("t5")
    without = {name: tensor for name, tensor in model.source.tensors.items() if "block.1.layer.0.SelfAttention.k.weight" not in name}
    with pytest.raises(MissingError, match=r"block\.1\.layer\.0\.SelfAttention\.k\.weight"):
        fill_again(model, without)
    wider = {name: torch.zeros(5, 5) if "block.1.layer.0.SelfAttention.k.weight" in name else tensor for name, tensor in model.source.tensors.items()}
    with pytest.raises(IncompatibleError, match=r"k\.weight` is \[5, 5\]"):
        fill_again(model, wider)


def fill_again(model, tensors):
    """The same graph over another checkpoint."""
    source = MemorySource(tensors)
    drawn = replace(model.drawn, stored=stored_names(build(model.subject), source, model.config))
    return fill(drawn, source, scheme_of("fp32"))


def test_a_weight_that_is_not_a_number_is_named(tmp_path):
    model = tiny("t5")
    source = MemorySource(dict(model.source.tensors))
    name = "encoder.block.0.layer.1.DenseReluDense.wi.weight"
    source.tensors[name] = source.tensors[name].clone().fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=name):
        model.export("int8", tmp_path, source)


@pytest.mark.parametrize(
    ("config", "task", "error", "said"),
    [
        ({"model_type": "own", "auto_map": {"AutoModel": "x.Y"}}, None, UnsupportedError, "code is in the checkpoint"),
        ({"model_type": "bert"}, None, UnsupportedError, "no architecture"),
        ({"model_type": "bert", "architectures": ["BertForNothing"]}, None, UnsupportedError, "BertForNothing"),
        (CONFIGS["bert"], "no-such-task", UsageError, "no-such-task"),
        (CONFIGS["bert"], "image-classification", UnsupportedError, "no bert model for image-classification"),
        (CONFIGS["bert"] | {"num_attention_heads": 7}, None, UnsupportedError, "multiple of the number of attention"),
    ],
)
def test_what_cannot_be_traced_is_refused_with_a_reason(config, task, error, said):
    with pytest.raises(error, match=said) as caught:
        plan_traced(MemorySource({}), config, "int8", task=task)
    assert caught.value.hint


def test_a_failure_inside_torch_names_the_operator():
    class Odd(torch.nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(3, 4, dtype=dtype))

        def forward(self, x):
            return torch.linalg.eigvals(x @ self.weight.T).real

    subject = Subject("other", Odd, lambda size: {"x": torch.ones(3, 4)}, {})
    with pytest.raises(UnsupportedError, match="linalg_eig"):
        trace(subject, build(subject), set())
