"""Adapters beside traced graphs: what PEFT's live model computes, over weights that stay as they are."""

import copy

import numpy as np
import onnx
import pytest
import torch

from qlora_tools.adapters.peft_files import read_adapter
from qlora_tools.errors import UnsupportedError
from qlora_tools.export.decoder.branches import Beside
from qlora_tools.export.schemes import scheme_of
from qlora_tools.export.target import Target
from qlora_tools.export.traced.export import draw, fill, write_traced
from qlora_tools.export.traced.inputs import results
from qlora_tools.export.traced.parity import check_traced
from qlora_tools.models.family import family_of
from qlora_tools.verbs.export_traced import plan_any
from tests.export.adapters_run import factors_in
from tests.export.traced.tiny_models import CONFIGS, relative_error, run, tiny

LINEARS = {"bert": ["query", "value", "dense"], "vit": ["q_proj", "v_proj", "fc1"], "t5": ["q", "wo"]}


def adapted(model, folder, seed=0, **options):
    """(PEFT's live model, the folder it saved its adapter in); every factor is random."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    live = get_peft_model(copy.deepcopy(model), LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    for name, parameter in live.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.normal_(std=0.3 / parameter.shape[-1] ** 0.5)
    live.eval().save_pretrained(str(folder))
    return live, folder


def read(made, folder):
    return read_adapter(folder, made.source.specs, family_of(made.config))


@torch.inference_mode()
def answer(made, live, size):
    found = results(live.get_base_model()(**made.subject.draw(size), **made.subject.options), made.subject.outputs)
    return {name: tensor.numpy() for name, tensor in found.items()}


def written(made, scheme, folder, **beside):
    folder.mkdir(exist_ok=True)
    export = fill(made.drawn, made.source, scheme_of(scheme), beside=Beside(**beside))
    write_traced(export, made.source, folder)
    return export


@pytest.mark.parametrize("name", LINEARS)
def test_a_graph_computes_what_peft_computes_and_the_base_without(name, tmp_path):
    made = tiny(name)
    live, folder = adapted(made.model, tmp_path / "a", target_modules=LINEARS[name])
    export = written(made, "fp32", tmp_path / "kept", kept={"x": (read(made, folder), 1.0)})
    factors = factors_in(tmp_path / "kept/x.onnx_adapter")
    assert {name.rpartition(".")[0] for name in factors} == set(export.branches.inputs) and all(array.dtype == np.float16 for array in factors.values())
    written(made, "fp32", tmp_path / "fixed", fixed=[(read(made, folder), 1.0)])
    fixed = tmp_path / "fixed"
    for size in (0, 1):
        inputs, wanted, base = made.subject.draw(size), answer(made, live, size), made.answers(size)
        for output, expected in wanted.items():
            assert relative_error(expected, base[output]) > 0.01
            with_it = run(tmp_path / "kept", {**inputs, **{key: torch.from_numpy(value) for key, value in factors.items()}})
            assert relative_error(with_it[output], expected) < 1e-3  # factors are of 16 bits
            assert relative_error(run(fixed, inputs)[output], expected) < 1e-3
            assert relative_error(run(tmp_path / "kept", inputs)[output], base[output]) < 1e-5


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_weights_keep_their_form_beside_branches(scheme, tmp_path):
    made = tiny("bert")
    _, folder = adapted(made.model, tmp_path / "a", target_modules=LINEARS["bert"])
    adapter = read(made, folder)
    export = written(made, scheme, tmp_path / "e", kept={"x": (adapter, 0.5)}, fixed=[(adapter, 0.5)])
    for name in (None, "x"):
        assert check_traced(export, made.source, tmp_path / "e", adapter=name).error_carried < 0.01
    plain = written(made, scheme, tmp_path / "plain")
    graph = onnx.load(tmp_path / "e/model.onnx", load_external_data=False).graph
    bare = onnx.load(tmp_path / "plain/model.onnx", load_external_data=False).graph
    formed = {"MatMulNBits", "DynamicQuantizeLinear", "MatMulIntegerToFloat", "QGemm"}
    assert [node.op_type for node in graph.node if node.op_type in formed] == [node.op_type for node in bare.node if node.op_type in formed]
    added = sum(node.op_type == "Add" for node in graph.node) - sum(node.op_type == "Add" for node in bare.node)
    assert added == 2 * len(export.branches.inputs) and plain.branches.inputs == frozenset()


def test_onnxruntime_takes_the_adapter_by_its_own_means(tmp_path):
    import onnxruntime as ort

    made = tiny("vit")
    _, folder = adapted(made.model, tmp_path / "a", target_modules=LINEARS["vit"])
    written(made, "int8", tmp_path / "e", kept={"x": (read(made, folder), 1.0)})
    loaded, options = ort.LoraAdapter(), ort.RunOptions()
    loaded.Load(str(tmp_path / "e/x.onnx_adapter"))
    options.add_active_adapter(loaded)
    session = ort.InferenceSession(str(tmp_path / "e/model.onnx"), providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in made.subject.draw(0).items()}
    fed = session.run(None, feeds | factors_in(tmp_path / "e/x.onnx_adapter"))[0]
    assert np.array_equal(session.run(None, feeds, options)[0], fed) and not np.array_equal(session.run(None, feeds)[0], fed)


def test_sixteen_bit_graphs_take_factors_of_their_own_kind(tmp_path):
    made = tiny("vit")
    _, folder = adapted(made.model, tmp_path / "a", target_modules=LINEARS["vit"])
    target = Target("cuda", "BF16")
    drawn = draw(made.subject, made.source, made.config, target)
    export = fill(drawn, made.source, scheme_of("int8", target), beside=Beside({"x": (read(made, folder), 1.0)}))
    write_traced(export, made.source, tmp_path)
    assert check_traced(export, made.source, tmp_path, adapter="x").error_carried < 0.03
    kinds = {value.type.tensor_type.elem_type for value in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.input if ".lora_" in value.name}
    assert kinds == {onnx.TensorProto.BFLOAT16}


def test_a_weight_that_several_layers_share_has_one_pair_of_inputs(monkeypatch, tmp_path):
    sizes = {"hidden_size": 32, "embedding_size": 16, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 99}
    monkeypatch.setitem(CONFIGS, "albert", {"model_type": "albert", "architectures": ["AlbertForSequenceClassification"], **sizes})
    made = tiny("albert")
    live, folder = adapted(made.model, tmp_path / "a", target_modules=["query"])
    export = written(made, "fp32", tmp_path / "e", kept={"x": (read(made, folder), 1.0)})
    graph = onnx.load(tmp_path / "e/model.onnx", load_external_data=False).graph
    assert len(export.branches.inputs) == 1 and sum(".lora_" in value.name for value in graph.input) == 2
    factors = {key: torch.from_numpy(value) for key, value in factors_in(tmp_path / "e/x.onnx_adapter").items()}
    wanted = answer(made, live, 0)
    found = run(tmp_path / "e", {**made.subject.draw(0), **factors})
    assert all(relative_error(found[name], wanted[name]) < 1e-3 for name in wanted)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("vit", {"target_modules": ["query", "q_proj"], "use_dora": True}, "DoRA on"),
        ("vit", {"target_modules": ["projection"]}, "beside which a graph has no place"),
        ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}, "a whole `classifier.weight`"),
        ("bert-mlm", {"target_modules": ["word_embeddings"]}, "beside which a graph has no place"),
    ],
)
def test_what_is_no_change_of_a_linear_is_refused_by_name(name, options, said, tmp_path):
    made = tiny(name)
    _, folder = adapted(made.model, tmp_path / "a", **options)
    with pytest.raises(UnsupportedError, match=said) as caught:
        fill(made.drawn, made.source, scheme_of("int8"), beside=Beside({"x": (read(made, folder), 1.0)}))
    assert "--merge" in caught.value.hint


def test_a_model_of_several_graphs_is_refused_before_it_is_traced():
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True, "vocab_size": 99, "d_model": 32}
    with pytest.raises(UnsupportedError, match="three graphs keeps no adapter"):
        plan_any(None, config, "int8", Target(), None, Beside({"x": (None, 1.0)}), None, None)
