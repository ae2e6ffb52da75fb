"""PEFT adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``, read lazily and written.

Written adapters carry ``lora_alpha == r`` (and equal patterns), so that every consumer arrives at scale 1 whichever rule
it follows, and name exactly the modules that hold factors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qlora_tools.adapters.adapter import Adapter, Part, bind
from qlora_tools.adapters.peft_config import FILE_NAME, read_config
from qlora_tools.checkpoint.safetensors_file import SafetensorsFile
from qlora_tools.errors import MissingError, UnsupportedError
from qlora_tools.manifest import canonical_json, read_manifest
from qlora_tools.models.family import Family
from qlora_tools.specs import TensorSpec

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def read_adapter(folder: Path, base_specs: Mapping[str, TensorSpec], family: Family, *, ties: Mapping[str, str] | None = None) -> Adapter:
    """The adapter in ``folder``, bound to a base whose dense tensors are ``base_specs``. Only headers are read.

    Raises:
        MissingError, CorruptError, UnsupportedError: the folder cannot be read faithfully. IncompatibleError: it does not
        belong to this base.
    """
    config = read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = sorted(folder.glob("adapter_model*.bin"))
        if pickled:
            raise UnsupportedError(
                f"{pickled[0]} is a pickle, which can run code when opened",
                hint="load it with PEFT where you trust it and call save_pretrained(..., safe_serialization=True)",
            )
        raise MissingError(f"{path} is not there", hint="give the folder that holds adapter_config.json and adapter_model.safetensors")
    file = SafetensorsFile(path)
    parts = [Part(key, spec, partial(file.read, key)) for key, spec in file.specs.items()]
    manifest = read_manifest(folder)
    return bind(str(folder), config, parts, base_specs, family, ties=ties, base_tensors=manifest.base_tensors if manifest else None)


@dataclass(frozen=True)
class Target:
    """A module that gets factors. ``shape`` is that of its base weight; ``transposed``: it stores [inputs, outputs];
    ``embedding``: the factors are PEFT's ``lora_embedding_*``; ``bias``: it gets a ``lora_B.bias``."""

    module: str
    shape: tuple[int, ...]
    rank: int
    transposed: bool = False
    embedding: bool = False
    bias: bool = False

    @property
    def a_key(self) -> str:
        return f"{_PREFIX}{self.module}.{'lora_embedding_A' if self.embedding else 'lora_A.weight'}"

    @property
    def b_key(self) -> str:
        return f"{_PREFIX}{self.module}.{'lora_embedding_B' if self.embedding else 'lora_B.weight'}"

    @property
    def bias_key(self) -> str:
        return f"{_PREFIX}{self.module}.lora_B.bias"

    def specs(self, dtype: str) -> list[TensorSpec]:
        """The stored tensors of this module. A is [R, I...], B is [O, R...]."""
        turned = self.transposed or self.embedding
        outputs, inputs = (self.shape[1], self.shape[:1]) if turned else (self.shape[0], self.shape[1:])
        found = [TensorSpec(self.a_key, dtype, (self.rank, *inputs)), TensorSpec(self.b_key, dtype, (outputs, self.rank, *(1 for _ in inputs[1:])))]
        return found + ([TensorSpec(self.bias_key, dtype, (outputs,))] if self.bias else [])


def saved_key(name: str, *, wrapped: bool = False) -> str:
    """The stored key of a whole replaced tensor; ``wrapped``: of a module that also gets factors."""
    module, _, leaf = name.rpartition(".")
    return f"{_PREFIX}{module}.base_layer.{leaf}" if wrapped else f"{_PREFIX}{name}"


def adapter_config(
    targets: Iterable[Target],
    modules: Iterable[str],
    *,
    modules_to_save: Iterable[str] = (),
    bias: str = "none",
    ensure_weight_tying: bool = False,
    base_model: str | None = None,
    task_type: str | None = None,
) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    ``modules``: every module path of the model, so that short suffixes are used only where they select exactly the
    targets. The rank most modules share becomes ``r``; the others stand in the patterns, anchored at both ends.
    """
    chosen = sorted(targets, key=lambda target: target.module)
    ranks = [target.rank for target in chosen]
    common = max(sorted(set(ranks)), key=ranks.count) if ranks else 8
    others = {f"^{re.escape(target.module)}": target.rank for target in chosen if target.rank != common}
    saved = sorted(set(modules_to_save))
    known = sorted({prefix for module in modules for prefix in _prefixes(module)})
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "target_modules": _selection([target.module for target in chosen], known),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(target.transposed for target in chosen),
        "lora_bias": any(target.bias for target in chosen),
        "bias": bias,
        "ensure_weight_tying": ensure_weight_tying,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }


def task_type_of(config: Mapping[str, Any]) -> str | None:
    """PEFT's task type for a model's config.json; ``None`` where PEFT should use no task-specific wrapper."""
    architecture = str((config.get("architectures") or [""])[0])
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if architecture.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder") else None


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``adapter_config.json``."""
    (folder / FILE_NAME).write_bytes(canonical_json(dict(config)))


def _prefixes(module: str) -> list[str]:
    """The module and every container above it: PEFT matches names against containers too, and cannot adapt one."""
    parts = module.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _selection(chosen: list[str], known: list[str]) -> list[str] | str:
    """The shortest of: last path parts, full paths, one regular expression, that selects exactly ``chosen`` by PEFT's rule."""
    for names in (sorted({module.rpartition(".")[2] for module in chosen}), chosen):
        if [module for module in known if module in names or module.endswith(tuple(f".{name}" for name in names))] == sorted(set(chosen)):
            return names
    return "|".join(re.escape(module) for module in chosen)
