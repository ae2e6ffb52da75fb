"""What the files beside a graph say about running it: genai_config.json first, generation_config.json for the text.

``model.decoder.session_options`` is applied to our session as onnxruntime-genai applies it to its own: provider options by
provider, known names as fields, every other name as a config entry (``ep.cuda.fpa_intb_gemm``). Two things are not taken over:
numbers of threads and logging, which are the caller's, and libraries of custom operators, which would run code from the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tools.errors import CorruptError, UnsupportedError

GENAI_CONFIG, GENERATION_CONFIG = "genai_config.json", "generation_config.json"
_OURS = {"log_id", "log_severity_level", "log_verbosity_level", "enable_profiling", "use_env_allocators", "intra_op_num_threads", "inter_op_num_threads"}


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
        CorruptError: a file that is not what its name says. UnsupportedError: a library of custom operators.
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
        providers = {
            str(name).lower(): {key: _text(value) for key, value in given.items()} for row in options.pop("provider_options", []) for name, given in row.items()
        }
        described = Description(
            context_length=int(model["context_length"]),
            head_size=int(decoder["head_size"]),
            shared_buffer=bool(search.get("past_present_share_buffer", False)),
            session_options={name: value for name, value in options.items() if name not in _OURS},
            providers=providers,
            stop_tokens=stops | _tokens(model.get("eos_token_id")),
            search={**search, **generation},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptError(f"{path} holds no context_length, head_size and session_options as onnxruntime-genai writes them", hint="export again") from error
    if "custom_ops_library" in options:
        raise UnsupportedError(f"{path} names a library of custom operators, which is not loaded", hint="export again")
    return described


def _context(path: Path) -> int | None:
    """The number of positions in a model's own config.json."""
    config = read_beside(path)
    found = config.get("max_position_embeddings", config.get("n_positions"))
    return found if isinstance(found, int) else None


def read_beside(path: Path) -> dict[str, Any]:
    """The object in a JSON file beside a graph; empty where there is no such file.

    Raises:
        CorruptError: not JSON, or no object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptError(f"{path} is not JSON: {error}", hint="export again") from error
    if not isinstance(content, dict):
        raise CorruptError(f"{path} holds a {type(content).__name__}, not an object", hint="export again")
    return content


def _tokens(found: Any) -> frozenset[int]:
    return frozenset(value for value in (found if isinstance(found, list) else [found]) if isinstance(value, int))


def _text(value: Any) -> str:
    """As onnxruntime takes options: booleans as 1 and 0."""
    return str(int(value)) if isinstance(value, bool) else str(value)
