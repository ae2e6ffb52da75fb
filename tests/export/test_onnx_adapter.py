"""``.onnx_adapter`` files: named after the graph's inputs, the same bytes for the same factors, and read by ONNX Runtime itself."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch

from qlora_tools.errors import UsageError
from qlora_tools.export.decoder.branches import Beside, Factors
from qlora_tools.export.decoder.export import plan_export, write_graph
from qlora_tools.export.onnx_adapter import adapter_names, file_of, write_adapter_file
from qlora_tools.export.runtime.session import DecoderSession
from tests.export.adapters_run import Plain, bound, factors_in, peft_adapter
from tests.export.tiny_decoders import build, tokens

NAMES = {"layers.0.qkv.lora_A", "layers.0.qkv.lora_B", "layers.1.down.lora_A", "layers.1.down.lora_B"}


def factors(kind=torch.float16, rank=3):
    torch.manual_seed(0)
    return {name: Factors(torch.randn(8, rank).to(kind), torch.randn(rank, 6).to(kind)) for name in ("layers.1.down", "layers.0.qkv")}


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """A tiny int4 graph with two adapters of different rank and reach: (folder, some ids)."""
    folder = tmp_path_factory.mktemp("kept")
    tiny = build("llama")
    _, a = peft_adapter(tiny, folder / "a")
    _, b = peft_adapter(tiny, folder / "b", seed=1, r=2, target_modules=["v_proj", "down_proj"])
    planned = plan_export(tiny.source, tiny.config, "int4", beside=Beside({"a": (bound(tiny, a), 1.0), "b": (bound(tiny, b), 1.0)}))
    (folder / "e").mkdir()
    write_graph(planned, tiny.source, folder / "e")
    return folder / "e", tokens(tiny, 2, 7)


def test_the_file_holds_what_was_written(tmp_path):
    write_adapter_file(tmp_path / "x.onnx_adapter", factors())
    found = factors_in(tmp_path / "x.onnx_adapter")
    assert set(found) == NAMES and np.array_equal(found["layers.0.qkv.lora_B"], factors()["layers.0.qkv"].b_RO.numpy())
    file = ort.AdapterFormat.read_adapter(str(tmp_path / "x.onnx_adapter"))
    assert (file.get_adapter_version(), file.get_model_version()) == (1, 1)


def test_the_order_of_factors_does_not_show_in_the_bytes(tmp_path):
    one, two = factors(), dict(reversed(factors().items()))
    write_adapter_file(tmp_path / "one", one)
    write_adapter_file(tmp_path / "two", two)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_bf16_factors_keep_their_type(tmp_path):
    write_adapter_file(tmp_path / "x.onnx_adapter", factors(torch.bfloat16))
    values = ort.AdapterFormat.read_adapter(str(tmp_path / "x.onnx_adapter")).get_parameters()
    assert {value.element_type() for value in values.values()} == {16}


def test_a_relative_path_is_written_where_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    from pathlib import Path

    write_adapter_file(file_of(Path("inner"), "x"), factors())
    assert (tmp_path / "inner" / "x.onnx_adapter").is_file()


def test_adapters_are_named_after_their_folders_and_never_twice():
    assert adapter_names(["tuned-r16", "org/code v2"]) == ["tuned-r16", "org-code-v2"]
    with pytest.raises(UsageError, match="two adapters would be called `a-b`"):
        adapter_names(["a-b", "a b"])


def test_names_types_and_sizes_are_those_of_the_graph(graph):
    folder, _ = graph
    inputs = Plain(folder).factors
    for name in ("a", "b"):
        for key, array in factors_in(file_of(folder, name)).items():
            wanted = inputs[key]
            assert wanted.type == "tensor(float16)" and array.dtype == np.float16
            assert all(isinstance(size, str) or size == found for size, found in zip(wanted.shape, array.shape, strict=True))
    assert set(factors_in(file_of(folder, "b"))) < set(factors_in(file_of(folder, "a"))) == set(inputs)


def test_the_runtimes_own_way_of_choosing_an_adapter_gives_the_same_logits(graph):
    folder, ids = graph
    plain = Plain(folder)
    base = plain.run(ids)
    for name in ("a", "b"):
        adapter, options = ort.LoraAdapter(), ort.RunOptions()
        adapter.Load(str(file_of(folder, name).resolve()))
        options.add_active_adapter(adapter)
        chosen = plain.run(ids, options=options)
        assert np.array_equal(chosen, plain.run(ids, factors_in(file_of(folder, name)))) and not np.allclose(chosen, base, atol=1e-2)
    assert np.array_equal(plain.run(ids), base)


def test_our_runtime_swaps_adapters_without_loading_the_graph_again(graph):
    folder, ids = graph
    session, plain = DecoderSession(folder, threads=1), Plain(folder)
    for name in ("a", None, "b", "a", None):
        session.use(name)
        wanted = plain.run(ids, factors_in(file_of(folder, name)) if name else None)
        assert np.allclose(session.score(ids), wanted, atol=1e-5)
        assert np.allclose(session.prefill(ids[:, :-1]), wanted[:, -2], atol=0.05 * np.abs(wanted).max())
    session.close()
