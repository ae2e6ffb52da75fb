"""What the files beside a graph say about running it: genai_config.json first, generation_config.json for the text.

``model.decoder.session_options`` is applied to our session as onnxruntime-genai applies it to its own: provider options by
provider, known names as fields, every other name as a config entry (``ep.cuda.fpa_intb_gemm``). The folder may be anybody's, and ONNX Runtime has options
that write files, read them from anywhere or take addresses of memory. So what is taken is listed, and everything else is refused by name. Two things are
passed over: numbers of threads and logging, which are the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tools.errors import CorruptError, UnsupportedError

GENAI_CONFIG, GENERATION_CONFIG = "genai_config.json", "generation_config.json"
#: Passed over. The last three are fields of older releases of onnxruntime-genai, for devices other than ours.
_OURS = frozenset(
    ("log_id", "log_severity_level", "log_verbosity_level", "use_env_allocators", "intra_op_num_threads", "inter_op_num_threads",
     "disable_cpu_ep_fallback", "disable_quant_qdq", "enable_quant_qdq_cleanup")
)  # fmt: skip
#: They write a file; switched off they are passed over.
_WRITING = frozenset(("enable_profiling", "ep_context_enable", "ep.context_enable"))
_OFF = ("", "0", "off", "false", "none")
_LIBRARY = "custom_ops_library"
_TAKEN = frozenset(
    ("enable_cpu_mem_arena", "enable_mem_pattern", "graph_optimization_level", "ep.cuda.fpa_intb_gemm", "session.use_device_allocator_for_initializers",
     "session.disable_prepacking", "session.set_denormal_as_zero", "session.intra_op.allow_spinning", "session.inter_op.allow_spinning",
     "session.force_spinning_stop", "session.dynamic_block_base", "session.disable_quant_qdq", "session.enable_quant_qdq_cleanup",
     "session.disable_double_qdq_remover", "session.qdq_matmulnbits_accuracy_level", "session.qdqisint8allowed", "session.x64quantprecision",
     "session.disable_aot_function_inlining", "session.disable_cpu_ep_fallback", "session.graph_optimizations_loop_level",
     "optimization.enable_gelu_approximation", "optimization.enable_cast_chain_elimination", "optimization.disable_specified_optimizers",
     "mlas.enable_gemm_fastmath_arm64_bfloat16")
)  # fmt: skip
#: Options of the CUDA provider, the only one whose options are handed on. Those that are not here are addresses, or belong to them.
_CUDA_TAKEN = frozenset(
    ("device_id", "gpu_mem_limit", "arena_extend_strategy", "do_copy_in_default_stream", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace",
     "cudnn_conv1d_pad_to_nc1d", "enable_cuda_graph", "enable_skip_layer_norm_strict_mode", "prefer_nhwc", "use_tf32", "fuse_conv_bias", "sdpa_kernel",
     "use_ep_level_unified_stream", "tunable_op_enable", "tunable_op_tuning_enable", "tunable_op_max_tuning_duration_ms")
)  # fmt: skip
#: Which of several devices to take: there is one here.
_CHOOSING = "device_filtering_options"
_MOST, _LONGEST_VALUE = 2**31, 1024


@dataclass(frozen=True)
class Description:
    """``shared_buffer``: pasts and presents are one buffer of fixed length; otherwise presents are the pasts and one position more.

    ``providers``: options by provider in lower case, in the file's order. ``search``: settings of sampling, as transformers names them.
    """

    context_length: int | None = None
    head_size: int | None = None
    shared_buffer: bool = False
    session_options: Mapping[str, Any] = field(default_factory=dict)
    providers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    stop_tokens: frozenset[int] = frozenset()
    search: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The device that the graph was made for."""
        return next(iter(self.providers), "cpu")


def describe(folder: Path) -> Description:
    """What the files in ``folder`` say; a folder without genai_config.json gets what holds for every graph.

    Raises:
        CorruptError: a file that is not what its name says. UnsupportedError: an option that is not taken from a folder, a library of custom operators
        among them.
    """
    generation = read_beside(folder / GENERATION_CONFIG)
    stops = _tokens(generation.get("eos_token_id"))
    path = folder / GENAI_CONFIG
    content = read_beside(path)
    if not content:
        return Description(_context(folder / "config.json"), stop_tokens=stops, search=generation)
    try:
        model, decoder, search = content["model"], content["model"]["decoder"], dict(content.get("search", {}))
        options = dict(decoder.get("session_options", {}))
        rows = [(str(name).lower(), dict(given)) for row in options.pop("provider_options", []) for name, given in row.items()]
        context_length, head_size = _size(model["context_length"]), _size(decoder["head_size"])
        ends = _tokens(model.get("eos_token_id"))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptError(f"{path} holds no context_length, head_size and session_options as onnxruntime-genai writes them", hint="export again") from error
    return Description(
        context_length=context_length,
        head_size=head_size,
        shared_buffer=bool(search.get("past_present_share_buffer", False)),
        session_options=_session_options(options, path),
        providers=_providers(rows, path),
        stop_tokens=stops | ends,
        search={**search, **generation},
    )


def _session_options(given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Those of ``given`` that are applied.

    Raises:
        UnsupportedError: one that is neither taken nor passed over. CorruptError: a value that is none.
    """
    taken = {}
    for name, value in given.items():
        if name in _OURS or (name in _WRITING and str(value).lower() in _OFF):
            continue
        if name == _LIBRARY:
            raise UnsupportedError(f"{path} names a library of custom operators, which is not loaded", hint="export again")
        if name not in _TAKEN:
            raise _refusal(f"session option {name!r:.120}", path)
        _text(value, name, path)
        taken[name] = value
    return taken


def _providers(rows: Iterable[tuple[str, Mapping[str, Any]]], path: Path) -> dict[str, dict[str, str]]:
    """Options by provider. Of other providers than CUDA only the name matters: none of theirs is handed on.

    Raises:
        As :func:`_session_options`.
    """
    found: dict[str, dict[str, str]] = {}
    for provider, given in rows:
        options = {name: value for name, value in given.items() if name != _CHOOSING} if provider == "cuda" else {}
        for name in options:
            if name not in _CUDA_TAKEN:
                raise _refusal(f"option {name!r:.120} of the CUDA provider", path)
        found[provider] = {name: _text(value, name, path) for name, value in options.items()}
    return found


def _refusal(what: str, path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"{path} sets the {what}, which is not taken from a folder: options like it write files, read them from anywhere or take addresses of memory",
        hint="delete that line from the file if you know what it is for; the graph runs without it",
    )


def _context(path: Path) -> int | None:
    """The number of positions in a model's own config.json."""
    config = read_beside(path)
    found = config.get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) and found > 0 else None


def read_beside(path: Path) -> dict[str, Any]:
    """The object in a JSON file beside a graph; empty where there is no such file.

    Raises:
        CorruptError: not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is not JSON: {error}", hint="export again") from error
    if not isinstance(content, dict):
        raise CorruptError(f"{path} holds a {type(content).__name__}, not an object", hint="export again")
    return content


def _size(value: Any) -> int:
    """Raises:
    TypeError, ValueError, OverflowError: no number that a size could be.
    """
    found = int(value)
    if not 1 <= found <= _MOST:
        raise ValueError(f"{found} is not within 1 and {_MOST}")
    return found


def _tokens(found: Any) -> frozenset[int]:
    return frozenset(value for value in (found if isinstance(found, list) else [found]) if isinstance(value, int))


def as_text(value: Any) -> str:
    """As onnxruntime takes options: booleans as 1 and 0."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def _text(value: Any, name: str, path: Path) -> str:
    """:func:`as_text` of a value that may be one.

    Raises:
        CorruptError: longer than any option is, half of a character, or no single value.
    """
    text = as_text(value)
    if not isinstance(value, str | int | float) or len(text) > _LONGEST_VALUE or not text.isprintable():
        raise CorruptError(f"{path}: `{name}` is {text[:40]!r}, expected a word or a number of at most {_LONGEST_VALUE} characters", hint="export again")
    return text
