"""``adapter_config.json`` as PEFT means it, read as a file from a stranger.

Every field that changes what an adapter computes is honoured; every field that would change it in a way this package
does not follow is refused by name; so is a field this version has never heard of, unless it says nothing. Fields that
matter only while training are let through. PEFT itself is not imported: :data:`FIELDS` is the table, and a test
compares it with the installed PEFT.

Rank and alpha of a module come from ``rank_pattern`` and ``alpha_pattern``, whose keys are regular expressions matched
as ``(.*\\.)?(key)$`` against the module's path, first hit wins. All patterns are matched by ``path_patterns.py``, which cannot hang.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_tools.adapters.fields import Fields, is_empty
from qlora_tools.adapters.path_patterns import path_pattern
from qlora_tools.errors import CorruptError, MissingError, UnsupportedError
from qlora_tools.names import shortened

FILE_NAME = "adapter_config.json"
_NUMBER = re.compile(r"\.(\d+)\.")
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")
_MAX_BYTES = 16 << 20

#: Field of PEFT's LoraConfig -> how it is treated. ``used``: read below. ``training``: says how the adapter was trained or
#: where it came from, not what it computes. ``refused``: changes what is computed; only its empty value passes.
FIELDS: Mapping[str, str] = {
    "r": "used",
    "lora_alpha": "used",
    "rank_pattern": "used",
    "alpha_pattern": "used",
    "use_rslora": "used",
    "use_dora": "used",
    "fan_in_fan_out": "used",
    "lora_bias": "used",
    "bias": "used",
    "modules_to_save": "used",
    "target_modules": "used",
    "exclude_modules": "used",
    "layers_to_transform": "used",
    "layers_pattern": "used",
    "trainable_token_indices": "used",
    "ensure_weight_tying": "used",
    "init_lora_weights": "used",
    "peft_type": "used",
    "base_model_name_or_path": "used",
    "task_type": "training",
    "auto_mapping": "training",
    "peft_version": "training",
    "revision": "training",
    "inference_mode": "training",
    "lora_dropout": "training",
    "megatron_config": "training",
    "megatron_core": "training",
    "loftq_config": "training",
    "eva_config": "training",
    "corda_config": "training",
    "lora_ga_config": "training",
    "velora_config": "training",
    "qalora_group_size": "training",
    "runtime_config": "training",
    "use_qalora": "refused",
    "monteclora_config": "refused",
    "layer_replication": "refused",
    "target_parameters": "refused",
    "use_bdlora": "refused",
    "arrow_config": "refused",
    "kasa_config": "refused",
    "alora_invocation_tokens": "refused",
}
#: Why a refused field cannot be merged, and what to do.
_REASONS: Mapping[str, str] = {
    "use_qalora": "its A factor acts on pooled input groups",
    "monteclora_config": "its weights are sampled",
    "layer_replication": "the adapted model has more layers than its base",
    "target_parameters": "it adapts parameters that hold all experts in one, each with factors of its own",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters by input",
    "kasa_config": "it carries singular values of its own and changes the base",
    "alora_invocation_tokens": "it acts only after its invocation tokens, so it cannot become part of the weights",
}
#: Initialisations that leave base + B A equal to the base at the start of training, so that the file alone tells all.
HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True)
class PeftConfig:
    """The fields that decide what a LoRA adapter computes; see PEFT's ``LoraConfig`` for each."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    ensure_weight_tying: bool = False
    base_model: str | None = None

    def rank_of(self, module: str) -> int:
        """The rank that ``module`` was given."""
        return self.rank_pattern.get(pattern_key(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """What ``B A`` is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(pattern_key(self.alpha_pattern, module), self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether the configuration puts a LoRA on ``module``."""
        if _selects(self.exclude_modules, module) or self.saves(module):
            return False
        if self.target_modules in (None, "all-linear"):
            return True
        if not _selects(self.target_modules, module):
            return False
        return isinstance(self.target_modules, str) or not self.layers_to_transform or self._layer_of(module) in self.layers_to_transform

    def saves(self, module: str) -> bool:
        """Whether ``module`` is trained and stored whole."""
        return any(_reaches(saved, module) for saved in self.modules_to_save)

    def _layer_of(self, module: str) -> int | None:
        if not self.layers_pattern:
            found = _ANY_LAYER.match(module)
        else:
            ends = (end for pattern in self.layers_pattern for end in path_pattern(pattern).ends(module))
            found = next((match for end in ends if (match := _NUMBER.match(module, end))), None)
        return int(found[1]) if found else None

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """Rows of the embedding ``module`` that the adapter replaces; ``None`` when it names none for it."""
        if isinstance(self.token_indices, Mapping):
            return next((rows for key, rows in self.token_indices.items() if module == key or module.endswith(f".{key}")), None)
        return self.token_indices or None


def pattern_key(patterns: Mapping[str, Any], module: str) -> str:
    """The first key of ``patterns`` that matches ``module`` by PEFT's rule, else ``module`` itself."""
    return next((key for key in patterns if path_pattern(key).tail(module)), module)


def _selects(wanted: str | tuple[str, ...] | None, module: str) -> bool:
    if wanted is None or wanted == "":
        return False
    if isinstance(wanted, str):
        return path_pattern(wanted).whole(module)
    return module in wanted or any(module.endswith(f".{name}") for name in wanted)


def _reaches(saved: str, module: str) -> bool:
    """PEFT's ``(^|.*\\.)saved($|\\..*)``: the pattern matches ``module`` or a container of it, from the front or after a dot."""
    return any(module[end : end + 1] in ("", ".") for end in path_pattern(saved).ends(module))


def read_config(folder: Path) -> PeftConfig:
    """Parse ``folder/adapter_config.json``.

    Raises:
        MissingError: no such file. CorruptError: not what a configuration may look like. UnsupportedError: an adapter that
        would be mis-applied.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise MissingError(f"{path} is not there", hint="give the folder that holds adapter_config.json and adapter_model.safetensors")
    if path.stat().st_size > _MAX_BYTES:
        raise CorruptError(f"{path} has {path.stat().st_size} bytes, far more than a configuration needs")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is not JSON: {error}", hint="download or save the adapter again") from None
    return parse_config(content, str(path))


def parse_config(content: Any, where: str = FILE_NAME) -> PeftConfig:
    """The configuration in the decoded JSON ``content``; ``where`` is named in errors. Raises as :func:`read_config`."""
    if not isinstance(content, dict):
        raise CorruptError(f"{where}: holds {type(content).__name__}, expected an object")
    fields = Fields(content, where)
    _refuse(content, where)
    config = PeftConfig(
        rank=fields.rank("r", 8),
        alpha=fields.number("lora_alpha", 8),
        rank_pattern={key: fields.checked_rank(f"rank_pattern[{key!r}]", value) for key, value in fields.patterns("rank_pattern").items()},
        alpha_pattern={key: fields.checked_number(f"alpha_pattern[{key!r}]", value) for key, value in fields.patterns("alpha_pattern").items()},
        use_rslora=fields.flag("use_rslora"),
        use_dora=fields.flag("use_dora"),
        fan_in_fan_out=fields.flag("fan_in_fan_out"),
        lora_bias=fields.flag("lora_bias"),
        bias=fields.choice("bias", ("none", "all", "lora_only")),
        modules_to_save=tuple(fields.regex("modules_to_save", name) for name in fields.names("modules_to_save")),
        target_modules=fields.selection("target_modules"),
        exclude_modules=fields.selection("exclude_modules"),
        layers_to_transform=fields.integers("layers_to_transform"),
        layers_pattern=tuple(fields.regex("layers_pattern", name) for name in fields.names("layers_pattern")),
        token_indices=fields.token_indices(),
        ensure_weight_tying=fields.flag("ensure_weight_tying"),
        base_model=content.get("base_model_name_or_path") if isinstance(content.get("base_model_name_or_path"), str) else None,
    )
    if config.use_dora and config.lora_bias:
        raise UnsupportedError(f"{where}: use_dora with lora_bias is not something PEFT defines", hint="save the adapter with one of the two")
    return config


def _refuse(content: Mapping[str, Any], where: str) -> None:
    kind = content.get("peft_type")
    if kind not in (None, "LORA"):
        raise UnsupportedError(
            f"{where}: peft_type is {kind!r}, this version reads LORA", hint="convert it with peft's `convert_to_lora`, or merge it with PEFT"
        )
    for name, value in content.items():
        if not is_empty(value) and FIELDS.get(name, "unknown") == "refused":
            named = f" ({shortened(map(str, value))})" if isinstance(value, list | tuple) else ""
            raise UnsupportedError(f"{where}: `{name}` is set{named}; {_REASONS[name]}", hint="merge this adapter with PEFT itself")
        if not is_empty(value) and name not in FIELDS:
            raise UnsupportedError(
                f"{where}: `{name}` = {str(value)[:80]} is unknown to this version and may change what the adapter computes", hint="remove it if it does not"
            )
    init = content.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in HARMLESS_INITS:
        raise UnsupportedError(
            f"{where}: init_lora_weights is {init!r}: the adapter belongs to base weights that its initialisation changed",
            hint="save it with `save_pretrained(..., path_initial_model_for_weight_conversion=...)`, which makes a plain LoRA",
        )
