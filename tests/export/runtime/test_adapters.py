"""Adapters as inputs: they change the output as they should, swap without reloading, and are refused where they do not fit."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qlora_tools.errors import CorruptError, IncompatibleError, MissingError
from qlora_tools.export.runtime import DecoderSession
from tests.export.runtime.small_graphs import VOCAB, WIDTH, adapted, factors, weights, write_adapter

IDS = np.array([[1, 4, 2]])


@pytest.fixture
def folder(tmp_path):
    return adapted(tmp_path / "export")


def expected(pair=None):
    rows, w = weights()
    if pair is not None:
        a, b = (array.astype(np.float32) for array in pair.values())
        w = w + a @ b
    return rows[IDS] @ w


def test_an_adapter_adds_its_product_and_leaves_no_trace(folder, tmp_path):
    session = DecoderSession(folder, threads=1)
    pairs = {rank: factors(rank, seed=rank) for rank in (1, 3)}
    paths = {rank: write_adapter(tmp_path / f"r{rank}.onnx_adapter", pair) for rank, pair in pairs.items()}
    loaded = session._session
    for rank in (1, 3, None, 3):
        session.use(None if rank is None else paths[rank])
        np.testing.assert_allclose(session.score(IDS), expected(pairs.get(rank)), rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(session.prefill(IDS), expected(pairs.get(rank))[:, -1], rtol=2e-5, atol=2e-5)
    assert session._session is loaded and session.info()["adapter"] == "r3.onnx_adapter"


def test_a_captured_step_does_not_outlive_the_buffers_of_its_adapter(folder, tmp_path):
    """An adapter that comes back has other buffers, also when others were used in between."""
    session = DecoderSession(folder, threads=1)
    path = write_adapter(tmp_path / "a.onnx_adapter", factors(1))
    session.use(path)
    session._graph_ids = {session._adapter.path: 1}
    session.use(None)
    assert session._graph_ids, "the steps of others stay"
    session.use(path)
    assert not session._graph_ids


def test_an_exports_own_adapters_have_names(folder):
    write_adapter(folder / "poems.onnx_adapter", factors(2))
    session = DecoderSession(folder, threads=1)
    assert list(session.adapters) == ["poems"]
    session.use("poems")
    np.testing.assert_allclose(session.score(IDS), expected(factors(2)), rtol=2e-5, atol=2e-5)


def test_iobinding_ignores_active_adapters_and_this_runtime_does_not(folder, tmp_path):
    """The reason why factors are fed as inputs: the runtime's own switch has no effect with bound buffers, and says nothing."""
    path = write_adapter(tmp_path / "a.onnx_adapter", factors(2))
    plain = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    active = ort.LoraAdapter()
    active.Load(str(path))
    options = ort.RunOptions()
    options.add_active_adapter(active)
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    np.testing.assert_allclose(plain.run(None, feeds, options)[0], expected(factors(2)), rtol=2e-5, atol=2e-5)
    binding = plain.io_binding()
    for name, content in feeds.items():
        binding.bind_cpu_input(name, content)
    binding.bind_output("logits")
    plain.run_with_iobinding(binding, options)
    np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0], expected(), rtol=2e-5, atol=2e-5)  # if this fails, onnxruntime has mended it
    session = DecoderSession(folder, threads=1)
    session.use(path)
    np.testing.assert_allclose(session.score(IDS), expected(factors(2)), rtol=2e-5, atol=2e-5)


def test_bf16_factors_are_fed_as_they_are(tmp_path):
    folder = adapted(tmp_path / "export", ir.DataType.BFLOAT16)
    pair = {name: (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for name, array in factors(2).items()}
    session = DecoderSession(folder, threads=1)
    session.use(write_adapter(tmp_path / "a.onnx_adapter", pair, kind=16))
    wide = {name: (bits.astype(np.uint32) << 16).view(np.float32) for name, bits in pair.items()}
    np.testing.assert_allclose(session.score(IDS), expected(wide), rtol=2e-5, atol=2e-5)


def test_switching_forgets_the_past(folder, tmp_path):
    from qlora_tools.errors import UsageError

    session = DecoderSession(folder, threads=1)
    session.prefill(IDS)
    session.use(write_adapter(tmp_path / "a.onnx_adapter", factors(2)))
    with pytest.raises(UsageError, match="decode before prefill"):
        session.decode(np.array([1]))


def without(name):
    return {key: array for key, array in factors(2).items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (factors(2, matrix="tail"), "the graph has no input `tail.lora_A`"),
        (
            {name: array.astype(np.float32) for name, array in factors(2).items()},
            r"`head.lora_A` is tensor\(float\) in the file and tensor\(float16\) in the graph",
        ),
        (factors(2) | {"head.lora_A": np.zeros((WIDTH + 1, 2), np.float16)}, r"`head.lora_A` is \[6, 2\] in the file and \[5, head.rank\] in the graph"),
        (factors(2) | {"head.lora_B": np.zeros((3, VOCAB), np.float16)}, r"`head.lora_B` is \[3, 7\] in the file and \[head.rank = 2, 7\] in the graph"),
        (without("head.lora_B"), "`head.lora_A` has no `head.lora_B` beside it"),
    ],
)
def test_what_does_not_fit_is_named(folder, tmp_path, tensors, message):
    path = write_adapter(tmp_path / "bad.onnx_adapter", tensors, kind=1 if next(iter(tensors.values())).dtype == np.float32 else 10)
    session = DecoderSession(folder, threads=1)
    write_adapter(folder / "good.onnx_adapter", factors(1))
    session.use("good")
    with pytest.raises(IncompatibleError, match=f"bad.onnx_adapter does not fit this graph: .*{message}"):
        session.use(path)
    np.testing.assert_allclose(session.score(IDS), expected(factors(1)), rtol=2e-5, atol=2e-5)


def test_files_that_are_none_are_refused(folder, tmp_path):
    session = DecoderSession(folder, threads=1)
    write_adapter(folder / "poems.onnx_adapter", factors(2))
    with pytest.raises(MissingError, match=r"`prose` is neither an adapter of .*it has poems"):
        session.use("prose")
    (tmp_path / "text.onnx_adapter").write_bytes(b"not an adapter at all")
    with pytest.raises(CorruptError, match="identifier `TORT` is missing"):
        session.use(tmp_path / "text.onnx_adapter")
    whole = (folder / "poems.onnx_adapter").read_bytes()
    (tmp_path / "cut.onnx_adapter").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptError, match="cannot be read"):
        session.use(tmp_path / "cut.onnx_adapter")


def test_a_graph_without_such_inputs_takes_no_adapter(tmp_path):
    from tests.export.runtime.small_graphs import summing

    session = DecoderSession(summing(tmp_path / "export"), threads=1)
    with pytest.raises(IncompatibleError, match="the graph has no inputs for adapters"):
        session.use(write_adapter(tmp_path / "a.onnx_adapter", factors(1)))
