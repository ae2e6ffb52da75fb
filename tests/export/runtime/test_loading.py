"""Options from the files beside a graph, devices that are not there, and what happens where decoding cannot be captured."""

import json
import sys

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qlora_tools.errors import CorruptError, OutOfMemory, UnsupportedError, UsageError
from qlora_tools.export.runtime import DecoderSession, loading, open_engine
from qlora_tools.export.runtime.description import Description, describe
from tests.export.runtime.small_graphs import Drawing, held_bytes, named, save, summing, value, write_genai

SHARED = {"past_present_share_buffer": True}


@pytest.fixture
def folder(tmp_path):
    return summing(tmp_path / "export")


def test_session_options_are_applied_as_genai_applies_them(folder):
    given = {"ep.cuda.fpa_intb_gemm": "1", "session.use_device_allocator_for_initializers": True, "enable_mem_pattern": False, "intra_op_num_threads": 3}
    write_genai(folder, {**given, "graph_optimization_level": "ORT_ENABLE_BASIC", "log_id": "genai", "provider_options": []})
    options = DecoderSession(folder, threads=1)._session.get_session_options()
    assert options.get_session_config_entry("ep.cuda.fpa_intb_gemm") == "1"
    assert options.get_session_config_entry("session.use_device_allocator_for_initializers") == "1"
    assert not options.enable_mem_pattern and options.intra_op_num_threads == 1
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC


def test_options_of_a_provider_reach_it(folder, monkeypatch):
    write_genai(folder, {"provider_options": [{"CUDA": {"enable_cuda_graph": True, "device_id": 0}}]})
    assert describe(folder).providers == {"cuda": {"enable_cuda_graph": "1", "device_id": "0"}} and describe(folder).device == "cuda"


def test_a_folder_without_descriptions_is_described_so_that_every_graph_runs(folder):
    assert describe(folder) == Description() and describe(folder).device == "cpu" and not describe(folder).shared_buffer


def test_stop_tokens_come_from_both_files(folder):
    write_genai(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6], "temperature": 0.6}))
    found = describe(folder)
    assert found.stop_tokens == {1, 5, 6} and found.search["temperature"] == 0.6 and found.context_length == 40


@pytest.mark.parametrize("content", ["[1]", "{", '{"model": {"context_length": 4}}', '{"model": {"context_length": "x", "decoder": {"head_size": 4}}}'])
def test_a_broken_description_is_named(folder, content):
    (folder / "genai_config.json").write_text(content)
    with pytest.raises(CorruptError, match=r"genai_config\.json"):
        DecoderSession(folder, threads=1)


def test_no_library_is_loaded_out_of_a_folder(folder):
    write_genai(folder, {"custom_ops_library": "evil.so"})
    with pytest.raises(UnsupportedError, match="library of custom operators"):
        DecoderSession(folder, threads=1)


@pytest.mark.parametrize(
    "name",
    [
        "session.collect_node_memory_stats_to_file",
        "session.optimized_model_external_initializers_file_name",
        "session.model_external_initializers_file_folder_path",
        "session.node_partition_config_file",
        "session.debug_layout_transformation",
        "ep.context_file_path",
        "ep_context_file_path",
        "optimized_model_filepath",
        "config_entries",
    ],
)
def test_an_option_that_is_not_known_to_stay_in_the_session_is_refused_by_name(folder, tmp_path, name):
    target = tmp_path / "written"
    write_genai(folder, {name: str(target)})
    with pytest.raises(UnsupportedError, match=rf"genai_config\.json sets the session option '{name}'") as raised:
        DecoderSession(folder, threads=1)
    assert "delete that line" in raised.value.hint and not target.exists()


@pytest.mark.parametrize("name", ["enable_profiling", "ep_context_enable", "ep.context_enable"])
def test_options_that_write_files_are_passed_over_where_they_are_off(folder, name):
    for off in (False, "0", "OFF", "", None, 0):
        write_genai(folder, {name: off})
        assert describe(folder).session_options == {}
    write_genai(folder, {name: "here"})
    with pytest.raises(UnsupportedError, match=name):
        describe(folder)


@pytest.mark.parametrize(
    "name", ["user_compute_stream", "has_user_compute_stream", "gpu_external_alloc", "gpu_external_free", "default_memory_arena_cfg", "new"]
)
def test_options_of_cuda_that_are_addresses_or_unknown_are_refused_by_name(folder, name):
    write_genai(folder, {"provider_options": [{"cuda": {"enable_cuda_graph": "0", name: "140245"}}]})
    with pytest.raises(UnsupportedError, match=rf"genai_config\.json sets the option '{name}' of the CUDA provider"):
        describe(folder)


def test_folders_of_the_genai_builder_open(folder):
    """As its releases have written them for the CPU and CUDA; of providers that are not ours the name is kept."""
    write_genai(folder, {"log_id": "onnxruntime-genai", "provider_options": []})
    assert describe(folder).device == "cpu" and DecoderSession(folder, threads=1)
    cuda = {"enable_cuda_graph": "0", "enable_skip_layer_norm_strict_mode": "1", "device_filtering_options": {"hardware_device_type": "GPU"}}
    write_genai(folder, {"log_id": "onnxruntime-genai", "intra_op_num_threads": 8, "provider_options": [{"cuda": cuda}]})
    assert describe(folder).providers == {"cuda": {"enable_cuda_graph": "0", "enable_skip_layer_norm_strict_mode": "1"}}
    other = {"enableGraphCapture": "1", "validationMode": "disabled"}
    write_genai(folder, {"optimization.disable_specified_optimizers": "MatMulAddFusion", "provider_options": [{"WebGPU": other}]})
    assert describe(folder).device == "webgpu" and DecoderSession(folder, threads=1)
    write_genai(folder, {"disable_cpu_ep_fallback": True, "provider_options": [{"rocm": {"tunable_op_enable": "1"}}]})
    assert describe(folder).device == "rocm"


@pytest.mark.parametrize("value", ["x" * 1025, "\ud800", "a\0b", ["a"], {"a": 1}, None])
def test_a_value_that_is_no_option_is_corrupt(folder, value):
    write_genai(folder, {"session.dynamic_block_base": value})
    with pytest.raises(CorruptError, match=r"`session\.dynamic_block_base` is .*expected a word or a number"):
        describe(folder)
    write_genai(folder, {"provider_options": [{"cuda": {"gpu_mem_limit": value}}]})
    with pytest.raises(CorruptError, match="`gpu_mem_limit` is"):
        describe(folder)


@pytest.mark.parametrize("value", ["1" * (1 << 20), "\ud800"])
def test_a_value_that_onnxruntime_does_not_take_is_corrupt(folder, value):
    described = Description(session_options={"ep.cuda.fpa_intb_gemm": value})
    with pytest.raises(CorruptError, match=r"onnxruntime refuses ep\.cuda\.fpa_intb_gemm"):
        loading.load(folder / "model.onnx", 1, "cpu", described)


@pytest.mark.parametrize("length", ["Infinity", "NaN", "0", "-4", "1e30", str(2**40)])
def test_a_context_that_no_model_has_is_corrupt(folder, length):
    for text in (f'"context_length": {length}, "decoder": {{"head_size": 4}}', f'"context_length": 4, "decoder": {{"head_size": {length}}}'):
        (folder / "genai_config.json").write_text(f'{{"model": {{{text}}}}}')
        with pytest.raises(CorruptError, match=r"genai_config\.json holds no context_length"):
            describe(folder)


def test_json_deeper_than_python_reads_is_corrupt(folder):
    (folder / "genai_config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(CorruptError, match=r"genai_config\.json is not JSON"):
        describe(folder)


def test_an_unknown_level_of_optimization_is_named(folder):
    write_genai(folder, {"graph_optimization_level": "FAST"})
    with pytest.raises(CorruptError, match="'FAST'"):
        DecoderSession(folder, threads=1)


def test_a_device_that_does_not_start_is_an_error_and_not_the_cpu(folder, monkeypatch, capfd):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", lambda *_, **__: type("Fell", (), {"get_providers": lambda self: ["CPUExecutionProvider"]})())
    with pytest.raises(UsageError, match="CUDAExecutionProvider does not start here"):
        DecoderSession(folder, threads=1, device="cuda")
    assert capfd.readouterr().out == ""


def test_a_device_that_fails_while_starting_is_named(folder, monkeypatch):
    def failing(*_, **__):
        raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected")

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", failing)
    with pytest.raises(UsageError, match="does not start here: CUDA failure 100"):
        DecoderSession(folder, threads=1, device="cuda")


class Refusing:
    """Opens a graph as asked, and refuses graph capture as ONNX Runtime does when a node is not the device's."""

    def __init__(self, refuses=True):
        self.asked, self.refuses = [], refuses

    def __call__(self, path, threads, device, options, description):
        self.asked.append(options.get("enable_cuda_graph"))
        if options.get("enable_cuda_graph") == "1" and self.refuses:
            raise CorruptError("this session cannot use the graph capture feature")
        return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("refuses", "asked"), [(True, ["1", "0"]), (False, ["1"])])
def test_capture_is_asked_for_and_done_without_where_it_is_refused(folder, monkeypatch, refuses, asked):
    opened = Refusing(refuses)
    monkeypatch.setattr(loading, "_open", opened)
    monkeypatch.setattr(loading, "check_device", lambda device: None)
    loaded = loading.load(folder / "model.onnx", 1, "cuda", Description(shared_buffer=True))
    assert opened.asked == asked and loaded.captures is not refuses and ("cannot use the graph capture" in (loaded.uncaptured or "")) is refuses


def test_capture_is_not_asked_for_where_the_file_or_a_growing_past_forbids_it(folder, monkeypatch):
    opened = Refusing()
    monkeypatch.setattr(loading, "_open", opened)
    monkeypatch.setattr(loading, "check_device", lambda device: None)
    off = Description(shared_buffer=True, providers={"cuda": {"enable_cuda_graph": "0"}})
    assert not loading.load(folder / "model.onnx", 1, "cuda", off).captures
    assert not loading.load(folder / "model.onnx", 1, "cuda", Description(shared_buffer=False)).captures
    assert opened.asked == ["0", None]
    monkeypatch.setenv("QLT_CUDA_GRAPH", "0")
    assert not loading.load(folder / "model.onnx", 1, "cuda", Description(shared_buffer=True)).captures and opened.asked[-1] == "0"


def test_libraries_that_are_not_found_are_named_in_the_error(monkeypatch):
    def preload():
        sys.stdout.write("Loaded libcublas\nFailed to load libcudnn.so.9: cannot open shared object file\n")

    monkeypatch.setattr(loading.ort, "preload_dlls", preload, raising=False)
    assert loading._find_libraries() == "Failed to load libcudnn.so.9: cannot open shared object file"


def test_memory_that_runs_out_is_named_as_such(folder):
    failure = loading.named_failure(RuntimeError("BFCArena::Extend Failed to allocate memory for requested buffer of size 9"), folder / "model.onnx")
    assert isinstance(failure, OutOfMemory) and "smaller" in failure.hint


@pytest.mark.parametrize(
    ("reads", "shape", "message"),
    [
        ("pixels", ("B", "S", 7), "it has no `input_ids`"),
        ("input_ids", ("B", 7), "its logits are .*expected"),
        ("input_ids", ("B", "S", "V"), "its logits are .*expected"),
    ],
)
def test_a_graph_that_is_no_decoder_is_named(tmp_path, reads, shape, message):
    drawing = Drawing()
    x = value(reads, ir.DataType.FLOAT, *shape)
    y = named(drawing.op("Neg", x), "logits", ir.DataType.FLOAT, *shape)
    with pytest.raises(UnsupportedError, match=f"no decoder of text: {message}"):
        DecoderSession(save(tmp_path / "e", [x], [y], drawing), threads=1)


def test_a_graph_that_wants_more_than_text_is_named(tmp_path):
    drawing = Drawing()
    ids, pixels = value("input_ids", ir.DataType.FLOAT, "B", "S", 7), value("pixel_values", ir.DataType.FLOAT, "B", "S", 7)
    y = named(drawing.op("Add", ids, pixels), "logits", ir.DataType.FLOAT, "B", "S", 7)
    with pytest.raises(UnsupportedError, match="it reads `pixel_values`"):
        DecoderSession(save(tmp_path / "e", [ids, pixels], [y], drawing), threads=1)


def test_the_context_is_the_models_own_where_nothing_else_says_it(folder):
    (folder / "config.json").write_text('{"n_positions": 9}')
    assert describe(folder).context_length == 9


def test_a_failure_while_running_names_the_graph(folder):
    session = DecoderSession(folder, threads=1)
    with pytest.raises(CorruptError, match=r"model\.onnx does not run in onnxruntime"):
        session.score(np.array([[99]]))


def cuda(folder, monkeypatch, described, **options):
    """What a session on CUDA would be opened with: (provider options, session entries, strategies of the module's allocator, severities of the log)."""
    seen = {}

    def opening(path, threads, device, provider_options, description):
        seen["options"], seen["entries"] = provider_options, description.session_options
        return "a session"

    monkeypatch.setattr(loading, "_open", opening)
    monkeypatch.setattr(loading, "check_device", lambda device: None)
    strategies, severities = [], []
    monkeypatch.setattr(loading.bindings, "set_arena_extend_strategy", lambda strategy: strategies.append(strategy.name))
    monkeypatch.setattr(ort, "set_default_logger_severity", severities.append)
    loaded = loading.load(folder / "model.onnx", 1, "cuda", described, **options)
    return seen["options"], seen["entries"], strategies, severities, loaded.memory


SAYS = Description(
    session_options={"session.use_device_allocator_for_initializers": "0", "enable_mem_pattern": False, "ep.cuda.fpa_intb_gemm": "1"},
    providers={"cuda": {"arena_extend_strategy": "kNextPowerOfTwo", "gpu_mem_limit": "77", "device_id": "0"}},
)


def test_texts_are_generated_with_exact_arenas_unless_the_files_say_otherwise(folder, monkeypatch):
    options, entries, strategies, severities, told = cuda(folder, monkeypatch, Description())
    assert (options, entries, strategies, severities, told) == ({"arena_extend_strategy": "kSameAsRequested"}, {}, ["kSameAsRequested"], [3], None)
    options, entries, *_ = cuda(folder, monkeypatch, SAYS)
    assert options == SAYS.providers["cuda"] and entries == SAYS.session_options


def test_deployed_is_the_runtimes_own_way_whatever_the_files_say(folder, monkeypatch):
    options, entries, strategies, severities, told = cuda(folder, monkeypatch, SAYS, memory="deployed")
    assert (options, entries) == ({"device_id": "0"}, {"ep.cuda.fpa_intb_gemm": "1"})
    assert (strategies, severities, told) == (["kNextPowerOfTwo"], [3], "deployed")


def test_lean_takes_what_is_asked_for_and_logs_it(folder, monkeypatch):
    options, entries, strategies, severities, told = cuda(folder, monkeypatch, SAYS, memory="lean")
    assert options == {**SAYS.providers["cuda"], "arena_extend_strategy": "kSameAsRequested"}
    assert entries == {**SAYS.session_options, "session.use_device_allocator_for_initializers": "1"}
    assert (strategies, severities, told) == (["kSameAsRequested"], [3, 1], "lean")  # quiet first: the call in between warns


def test_a_limit_reaches_the_provider_in_every_mode(folder, monkeypatch):
    limit = held_bytes(folder / "model.onnx")
    for mode in ("runtime", "deployed", "lean"):
        options, *_, told = cuda(folder, monkeypatch, SAYS, memory=mode, memory_limit=limit)
        assert options["gpu_mem_limit"] == str(limit) and told == f"{mode}, at most {limit} bytes"
    with pytest.raises(OutOfMemory, match=f"{limit} bytes of weights, more than the limit of {limit - 1}"):
        cuda(folder, monkeypatch, SAYS, memory_limit=limit - 1)


def test_on_the_cpu_modes_are_accepted_and_say_that_they_change_nothing(folder):
    ids = np.array([[1, 2, 3]])
    plain = open_engine(str(folder), threads=1)
    assert "memory" not in plain.info()
    for mode in ("deployed", "lean"):
        engine = open_engine(str(folder), threads=1, memory=mode)
        assert engine.info()["memory"] == f"{mode}: changes nothing on the CPU" and np.array_equal(engine.score(ids), plain.score(ids))
    assert open_engine(str(folder), threads=1, memory_limit=9).info()["memory"] == "runtime, at most 9 bytes: changes nothing on the CPU"


def test_unknown_modes_and_limits_are_refused(folder):
    with pytest.raises(UsageError, match="memory 'tight': expected one of runtime, deployed, lean"):
        open_engine(str(folder), threads=1, memory="tight")
    with pytest.raises(UsageError, match="memory_limit is 0 bytes"):
        open_engine(str(folder), threads=1, memory_limit=0)


def test_what_the_modes_call_exists_in_this_onnxruntime():
    assert {"kSameAsRequested", "kNextPowerOfTwo"} <= set(loading.bindings.ArenaExtendStrategy.__members__)
    assert callable(loading.bindings.set_arena_extend_strategy) and callable(ort.set_default_logger_severity)


def test_an_arena_at_its_limit_is_out_of_memory(folder):
    said = "bfc_arena.cc:360 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Available memory of 9 is smaller than requested bytes of 10"
    assert isinstance(loading.named_failure(RuntimeError(said), folder / "model.onnx"), OutOfMemory)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["runtime", "deployed", "lean"])
def test_on_a_gpu_every_mode_computes_the_same(folder, mode):
    ids = np.array([[1, 2, 3]])
    engine = open_engine(str(folder), threads=1, device="cuda", memory=mode, memory_limit=1 << 30)
    assert np.allclose(engine.score(ids), open_engine(str(folder), threads=1).score(ids), atol=1e-3)
    asked = engine._session.get_provider_options()["CUDAExecutionProvider"]
    assert asked["gpu_mem_limit"] == str(1 << 30) and asked["arena_extend_strategy"] == ("kNextPowerOfTwo" if mode == "deployed" else "kSameAsRequested")
