"""A model family: which of its tensors play which role, read from one JSON file.

A family file holds (only ``model_type`` and ``roles`` are required)::

    model_type   the value of ``model_type`` in config.json that this file serves
    roles        role -> list of regular expressions over module paths; see ``Family.role``
    projections  query, key, value, fused -> patterns of the layers that compute them; see ``Family.projection``
    tied         module -> module whose weight it shares when the config says ``tie_word_embeddings``
    tied_default what ``tie_word_embeddings`` means when config.json does not hold it
    transposed   regular expressions of modules that store [in, out] (GPT-2's Conv1D)
    bare         modules of a checkpoint that the live model gathers into bare parameters (routers, experts of a mixture)
    decoder      how the decoder is wired, for direct ONNX export; see ``models/decoder.py``

A pattern matches a module path when it matches its whole tail: ``self_attn\\.q_proj`` matches
``model.layers.3.self_attn.q_proj``. Roles are tried in the order of the file. A model whose type has no
file uses ``generic.json``, whose patterns cover the names in common use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any

from qlora_tools.errors import UsageError
from qlora_tools.names import nearest, shortened, split_tensor

GENERIC = "generic"
ROLES = ("attn", "mlp", "expert", "embedding", "head", "norm")
PROJECTIONS = ("query", "key", "value", "fused")
#: Roles of layers that multiply activations, and so may carry a low-rank update.
_ADAPTABLE = ("attn", "mlp", "other")
#: What ``--targets`` names: preset -> the roles or projections whose layers it takes. A fused layer computes several
#: projections at once (GPT-2's ``c_attn``) and belongs to every preset that asks for one of them.
TARGET_PRESETS: Mapping[str, tuple[str, ...]] = {
    "minimal": ("query", "value", "fused"),
    "qkv": ("query", "key", "value", "fused"),
    "attn": ("attn",),
    "mlp": ("mlp",),
    "all": _ADAPTABLE,
}


@dataclass(frozen=True)
class Family:
    """One family's facts. Build with :func:`family_of`."""

    model_type: str
    roles: Mapping[str, tuple[re.Pattern[str], ...]]
    projections: Mapping[str, tuple[re.Pattern[str], ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    tied_default: bool = False
    transposed: tuple[re.Pattern[str], ...] = ()
    bare: tuple[re.Pattern[str], ...] = ()
    decoder: Mapping[str, Any] | None = None

    def role(self, module: str) -> str:
        """``attn``, ``mlp``, ``expert``, ``embedding``, ``head``, ``norm``, or ``other``: not named in the file."""
        for role, patterns in self.roles.items():
            if any(pattern.search(module) for pattern in patterns):
                return role
        return "other"

    def projection(self, module: str) -> str:
        """``query``, ``key``, ``value``, ``fused`` (several of them in one layer), or ``""``: none of these."""
        return next((kind for kind, patterns in self.projections.items() if any(pattern.search(module) for pattern in patterns)), "")

    def in_preset(self, preset: str, module: str) -> bool:
        """Whether ``module`` belongs to a preset. Embeddings, heads, norms and experts belong to none."""
        kinds, role = TARGET_PRESETS[preset], self.role(module)
        return role in _ADAPTABLE and (role in kinds or self.projection(module) in kinds)

    def is_transposed(self, module: str) -> bool:
        """True when the module's weight is stored [in, out] instead of [out, in]."""
        return any(pattern.search(module) for pattern in self.transposed)

    def stores_inputs_first(self, tensor_name: str, shape: tuple[int, ...]) -> bool:
        """True for the [in, out] weight of a transposed module. Never told from the shape: square weights exist."""
        module, leaf = split_tensor(tensor_name)
        return leaf == "weight" and len(shape) == 2 and self.is_transposed(module)

    def is_linear(self, tensor_name: str, shape: tuple[int, ...]) -> bool:
        """True for the 2-D ``weight`` of a layer that multiplies activations: not an embedding, head or norm."""
        module, leaf = split_tensor(tensor_name)
        return leaf == "weight" and len(shape) == 2 and self.role(module) in _ADAPTABLE

    def is_storable(self, tensor_name: str, shape: tuple[int, ...]) -> bool:
        """True for a linear that a quantized checkpoint may hold in parts: its module is a linear of the live model too."""
        return self.is_linear(tensor_name, shape) and not self.is_bare(split_tensor(tensor_name)[0])

    def is_bare(self, module: str) -> bool:
        """True for what the live model holds as bare parameters: transformers gathers experts while loading, and cannot gather codes."""
        return self.role(module) == "expert" or any(pattern.search(module) for pattern in self.bare)

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the model's head and embedding are one weight, as this config has it."""
        return bool(config.get("tie_word_embeddings", self.tied_default))

    def ties(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Tied tensor name -> the name of the tensor that holds its values, as this config has it."""
        return {f"{module}.weight": f"{owner}.weight" for module, owner in self.tied.items()} if self.is_tied(config) else {}

    def live_names(self, config: Mapping[str, Any], stored: Container[str]) -> Callable[[str], str]:
        """How a module path or tensor name of a checkpoint is called in the live model, ``stored`` being the checkpoint's tensors.

        Some checkpoints of a model with a head leave out the prefix of its body (``transformer.``), which the class adds on
        loading; a checkpoint of a bare body (``BertModel``) is loaded as such.
        """
        architecture = str((config.get("architectures") or [""])[0])
        bare = architecture.endswith("Model") and not architecture.endswith(("HeadModel", "HeadsModel"))
        for owner in () if bare else self.tied.values():
            prefix, _, rest = owner.partition(".")
            if rest and f"{owner}.weight" not in stored and f"{rest}.weight" in stored:
                unmoved = tuple(f"{name}." for name in (*self.tied, prefix))
                return lambda name: name if f"{name}.".startswith(unmoved) else f"{prefix}.{name}"
        return lambda name: name

    def targets(self, wanted: str, modules: Iterable[str]) -> list[str]:
        """Those of ``modules`` that ``wanted`` names: a preset of :data:`TARGET_PRESETS`, or a regular expression found in their paths.

        Raises:
            UsageError: not a regular expression, or nothing matches.
        """
        known = list(modules)
        if wanted in TARGET_PRESETS:
            chosen = [module for module in known if self.in_preset(wanted, module)]
        else:
            chosen = matching(wanted, known, "--targets", f"presets: {', '.join(TARGET_PRESETS)}")
        if not chosen:
            raise nothing_matches("--targets", wanted, known)
        return chosen


def matching(wanted: str, modules: Iterable[str], option: str, hint: str | None = None) -> list[str]:
    """The modules whose path holds a match of the regular expression ``wanted``, which the user gave with ``option``.

    Raises:
        UsageError: not a regular expression.
    """
    try:
        pattern = re.compile(wanted)
    except re.error as error:
        raise UsageError(f"{option} {wanted!r} is not a{' preset or' if hint else ''} regular expression: {error}", hint=hint) from error
    return [module for module in modules if pattern.search(module)]


def nothing_matches(option: str, wanted: str, modules: Iterable[str]) -> UsageError:
    """The error for a choice of modules that is empty: names the nearest modules, and the last parts of all paths."""
    known = list(modules)
    leaves = sorted({leaf for module in known if not (leaf := module.rpartition(".")[2]).isdigit()})
    words = re.findall(r"[A-Za-z_]\w+", wanted)
    close = nearest(wanted, leaves) or nearest(words[-1] if words else wanted, leaves) or nearest(wanted, known)
    listed = f"modules that could be chosen end in {shortened(leaves, 12)}" if leaves else "the model has no module that could be chosen"
    return UsageError(f"{option} {wanted!r} matches none of {len(known)} modules", hint=f"did you mean {', '.join(close)}? {listed}" if close else listed)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family for a config.json; the generic one when its ``model_type`` has no file."""
    model_type = str(config.get("model_type", GENERIC))
    return _load(model_type if model_type in known_families() else GENERIC)


@lru_cache(maxsize=1)
def known_families() -> frozenset[str]:
    """The ``model_type`` values that have a file of their own."""
    folder = resources.files(__package__) / "families"
    return frozenset(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")) - {GENERIC}


@lru_cache(maxsize=64)
def _load(model_type: str) -> Family:
    text = (resources.files(__package__) / "families" / f"{model_type}.json").read_text(encoding="utf-8")
    facts = json.loads(text)
    unknown = facts.keys() - Family.__dataclass_fields__.keys()
    assert not unknown, f"{model_type}.json: unknown fields {sorted(unknown)}"
    assert not facts["roles"].keys() - set(ROLES), f"{model_type}.json: unknown roles"
    assert not facts.get("projections", {}).keys() - set(PROJECTIONS), f"{model_type}.json: unknown projections"
    return Family(
        model_type=facts["model_type"],
        roles={role: _patterns(patterns) for role, patterns in facts["roles"].items()},
        projections={kind: _patterns(patterns) for kind, patterns in facts.get("projections", {}).items()},
        tied=facts.get("tied", {}),
        tied_default=facts.get("tied_default", False),
        transposed=_patterns(facts.get("transposed", ())),
        bare=_patterns(facts.get("bare", ())),
        decoder=facts.get("decoder"),
    )


def _patterns(patterns: Iterable[str]) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(rf"(?:^|\.)(?:{pattern})$") for pattern in patterns)
