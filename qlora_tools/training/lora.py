"""LoRA on a frozen model: which modules, at which rank and scale, put in by PEFT, started here, and written as a PEFT folder.

PEFT replaces the layers and computes the forward pass; this file decides everything that goes in. First values are seeded by
(seed, module path), so that they depend neither on the order of modules nor on the number of threads.

Scale. Plain LoRA keeps ``alpha / r`` the same for all modules: one with another rank gets an alpha in proportion, so ranks
change what a module can learn but not how fast. With rsLoRA alpha is the same for all and the scale ``alpha / sqrt(r)``
follows the rank, which is that method's point.

PiSSA and OLoRA take part of the weight into the adapter; the frozen layer subtracts it (``offset``). What is written is
``[A; A0], [B, -B0]`` at twice the rank: the same function on the stock base, for every reader.

Axes: O outputs, I inputs (kernels flattened), R rank.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from qlora_tools.adapters import portable_peft
from qlora_tools.adapters.peft_files import Target, adapter_config
from qlora_tools.cores import allowed_cores
from qlora_tools.engine.run import single_threaded_blas
from qlora_tools.errors import UnsupportedError, UsageError
from qlora_tools.live.frozen import FrozenConv1D, FrozenConv2d, FrozenLinear, StoredWeight, can_freeze, freeze_layer, outlines
from qlora_tools.lowrank import initial
from qlora_tools.lowrank.factors import LowRank
from qlora_tools.lowrank.svd import seed_of
from qlora_tools.models.family import Family, matching, nothing_matches
from qlora_tools.names import natural_key, shortened
from qlora_tools.specs import spec_of
from qlora_tools.training.config import CORRECTING, STORED, TrainConfig

ADAPTER = "default"
PREFIX = "base_model.model."
_ADAPTER_PART = re.compile(rf"\.(lora_A|lora_B|lora_magnitude_vector)\.{ADAPTER}(?=\.|$)")
_INSIDE_ADAPTER = re.compile(r"(^|\.)(base_layer|lora_\w+|modules_to_save|original_module)(\.|$)")
_NUMBERS = re.compile(r"\\.|\[[^\]]*\]|(?P<first>\d+)-(?P<last>\d+)")
_MOST_NUMBERS = 1000


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can carry a LoRA by path: linears, transformers' Conv1D, and 2-D convolutions.

    Convolutions in groups or with dilation are not among them: PEFT computes those in a way that no merge reproduces.
    """
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) or (isinstance(module, nn.Conv2d) and module.groups == 1 and set(module.dilation) == {1})
    }


def sides(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of an adaptable layer; a convolution reads channels times kernel positions."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    assert isinstance(module, nn.Conv2d), type(module)
    return module.out_channels, module.in_channels * math.prod(module.kernel_size)


def choose_modules(model: nn.Module, family: Family, targets: str) -> list[str]:
    """Paths of the layers that ``targets`` names, in natural order. Presets never take a head; a regular expression may.

    Raises:
        UsageError: not a regular expression, or nothing matches.
    """
    return sorted(family.targets(targets, adaptable(model)), key=natural_key)


def rank_of(model: nn.Module, modules: Iterable[str], config: TrainConfig) -> dict[str, int]:
    """The rank of each of ``modules``: that of the first pattern found in its path, else ``config.rank``.

    With ``config.rank_budget``: the ranks to measure need with, before ``training/ranks.py`` spreads them.

    In a pattern ``0-5``, outside brackets, means any whole number from 0 to 5: ``layers.0-5=4``.

    Raises:
        UsageError: a pattern that is wrong or matches nothing; a rank above the smaller side of a layer.
    """
    chosen, layers = list(modules), adaptable(model)
    ranks = dict.fromkeys(chosen, config.rank)
    if config.rank_budget is not None:
        ranks = {path: min(config.rank_budget, *sides(layers[path])) for path in chosen}
    for pattern, rank in reversed(config.rank_pattern):
        found = matching(with_number_ranges(pattern), chosen, "--rank-pattern")
        if not found:
            raise nothing_matches("--rank-pattern", pattern, chosen)
        ranks.update(dict.fromkeys(found, rank))
    narrow = {path: sides(layers[path]) for path, rank in ranks.items() if not 1 <= rank <= min(sides(layers[path]))}
    if narrow:
        named = shortened(f"`{path}` ({ranks[path]} of {outputs} x {inputs})" for path, (outputs, inputs) in narrow.items())
        path = min(narrow, key=lambda path: min(narrow[path]))
        raise UsageError(
            f"the rank must lie between 1 and the smaller side; it does not in {len(narrow)} modules: {named}",
            hint=f"add --rank-pattern '{re.escape(path)}={min(narrow[path])}', or choose other --targets",
        )
    return ranks


def with_number_ranges(pattern: str) -> str:
    """``layers.0-5`` as a regular expression for any of the numbers 0 to 5, as whole numbers. Brackets and escapes stay."""

    def expand(match: re.Match[str]) -> str:
        if match["first"] is None:
            return match[0]
        first, last = int(match["first"]), int(match["last"])
        if not first <= last < first + _MOST_NUMBERS:
            raise UsageError(f"--rank-pattern {pattern!r}: {match[0]} is not a range of 1 to {_MOST_NUMBERS} numbers", hint="write the lower number first")
        return rf"(?<!\d)(?:{'|'.join(map(str, range(first, last + 1)))})(?!\d)"

    return _NUMBERS.sub(expand, pattern)


def scale_of(rank: int, config: TrainConfig) -> float:
    """What ``B A`` of a module of this (final) rank is multiplied by; see the module's docstring."""
    return config.lora_alpha / (math.sqrt(rank) if config.rslora else config.rank)


def inject(
    model: Any,
    ranks: Mapping[str, int],
    config: TrainConfig,
    task_type: str | None = None,
    *,
    heads: Iterable[str] = (),
    originals: Callable[[str], torch.Tensor] | None = None,
    moments: Callable[[str], torch.Tensor | None] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> PeftModel:
    """Put LoRA layers with their first values on ``model``, in place. Nothing else of it becomes trainable.

    ``ranks``: module path -> final rank; with ``config.start_rank`` the layers begin at that rank, at the scale of the final one
    (``training/ranks.py`` lets them grow). ``task_type``: PEFT's (``CAUSAL_LM``, ``SEQ_CLS``, or none). ``heads``: modules that are trained
    whole. ``originals``: for LoftQ and QERA, module path -> weight before quantization, as the module's class orients it; ``moments``: for QERA,
    module path -> second moments of its input, where they are known. ``dtype``: of the factors. torch's random state is as before.

    Raises:
        UnsupportedError: PiSSA or OLoRA on a layer that cannot subtract, LoftQ or QERA without the original weights. UsageError: a
        module both in ``ranks`` and in a head.
    """
    if config.init in CORRECTING and originals is None:
        raise UnsupportedError(f"--init {config.init} needs the weights before quantization", hint="give the 16-bit model as --base, or another --init")
    added_by_peft = ("classifier", "score") if task_type == "SEQ_CLS" else ()
    whole = _outermost(heads, added_by_peft)
    _refuse_twice(ranks, (*whole, *added_by_peft))
    if config.init in ("pissa", "olora"):
        for path in ranks:
            _make_subtractable(model, path)
    first = {path: min(rank, config.start_rank or rank) for path, rank in ranks.items()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fan_in_fan_out, which PEFT then sets right
        with nullcontext() if config.dora else outlines():  # PEFT looks at each weight; only DoRA at its content
            peft_model = get_peft_model(model, _peft_config(model, first, config, task_type, whole), ADAPTER, autocast_adapter_dtype=False)
    layers = lora_layers(peft_model)
    assert layers.keys() == ranks.keys(), f"PEFT took other modules: {shortened(layers.keys() ^ ranks.keys())}"
    for path, layer in layers.items():
        layer.scaling[ADAPTER] = scale_of(ranks[path], config)
        layer.final_rank = ranks[path]
    _start(layers, config, originals, moments, dtype)
    return peft_model


def _peft_config(model: nn.Module, ranks: Mapping[str, int], config: TrainConfig, task_type: str | None, heads: list[str]) -> LoraConfig:
    """Full module paths as one expression, and one pattern per rank: PEFT tries every pattern on every module."""
    groups: dict[int, list[str]] = {}
    for path, rank in ranks.items():
        groups.setdefault(rank, []).append(re.escape(path))
    patterns = {f"^(?:{'|'.join(paths)})": rank for rank, paths in groups.items()}
    return LoraConfig(
        task_type=task_type,
        r=config.rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        rank_pattern=patterns,
        target_modules="|".join(path for paths in groups.values() for path in paths),
        modules_to_save=heads or None,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        fan_in_fan_out=any(isinstance(model.get_submodule(path), Conv1D) for path in ranks),
        init_lora_weights=True,
    )


def _outermost(heads: Iterable[str], known: tuple[str, ...]) -> list[str]:
    """Heads that lie in no other head, nor in one that PEFT adds by itself."""
    paths = sorted(set(heads))
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths) and not any(part in known for part in path.split("."))]


def _refuse_twice(ranks: Iterable[str], heads: Iterable[str]) -> None:
    twice = [path for path in ranks if any(f".{head}." in f".{path}." for head in heads)]
    if twice:
        raise UsageError(f"--targets names {shortened(twice)}, which the task trains whole", hint="leave it out of --targets")


def _make_subtractable(model: nn.Module, path: str) -> None:
    """A dense layer becomes a frozen one, which can subtract."""
    module = model.get_submodule(path)
    if isinstance(module, FrozenLinear | FrozenConv1D | FrozenConv2d):
        return
    if not can_freeze(module):
        raise UnsupportedError(f"`{path}` ({type(module).__name__}) cannot start inside its weight", hint="choose other --targets, or --init default")
    weight: Any = module.weight
    dense = weight.detach().T.contiguous() if isinstance(module, Conv1D) else weight.detach()
    bias: Any = module.bias
    model.set_submodule(path, freeze_layer(module, StoredWeight(None, spec_of(path, dense), {path: dense}), None if bias is None else bias.detach()))


def lora_layers(peft_model: PeftModel) -> dict[str, Any]:
    """PEFT's LoRA layers by module path, in natural order."""
    found = [(path, module) for path, module in peft_model.get_base_model().named_modules() if isinstance(module, LoraLayer)]
    return dict(sorted(found, key=lambda item: natural_key(item[0])))


def _start(
    layers: Mapping[str, Any],
    config: TrainConfig,
    originals: Callable[[str], torch.Tensor] | None,
    moments: Callable[[str], torch.Tensor | None] | None,
    dtype: torch.dtype,
) -> None:
    """Give every layer its first values, its dtype, and where it starts inside the weight, its offset."""
    on_cpu = all(layer.lora_A[ADAPTER].weight.device.type == "cpu" for layer in layers.values())
    workers = allowed_cores()
    with single_threaded_blas(), ThreadPoolExecutor(workers if on_cpu else 1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        starts = pool.map(lambda path: _first_values(path, layers[path], config, originals, moments), layers)
        for layer, factors in zip(layers.values(), starts, strict=True):
            _place(layer, factors.to(dtype))
            if config.init in ("pissa", "olora"):
                _subtract(layer, factors.to(dtype))
            for magnitude in layer.lora_magnitude_vector.values():
                magnitude.weight = nn.Parameter(magnitude.weight.detach().to(dtype))


@torch.no_grad()
def _first_values(
    path: str,
    layer: Any,
    config: TrainConfig,
    originals: Callable[[str], torch.Tensor] | None,
    moments: Callable[[str], torch.Tensor | None] | None,
) -> LowRank:
    rank, scale, name = layer.r[ADAPTER], layer.scaling[ADAPTER], f"{config.seed}/{path}"
    outputs, inputs = sides(layer.base_layer)
    made = layer.lora_A[ADAPTER].weight
    unreal = made.device.type == "meta" or isinstance(made, FakeTensor)  # a memory estimate: sizes are all that counts
    if config.init in ("default", "gaussian", STORED) or unreal:
        draw = initial.gaussian if config.init == "gaussian" else initial.uniform
        return LowRank(draw((rank, inputs), seed_of(name)), torch.zeros(outputs, rank))
    weight_OI = _as_matrix(layer.base_layer, layer.base_layer.weight)
    if config.init == "pissa":
        return initial.pissa(weight_OI, rank, scale, name)
    if config.init == "olora":
        return initial.olora(weight_OI, rank)
    assert originals is not None
    original_OI = _as_matrix(layer.base_layer, originals(path)).to(weight_OI.device)
    heard_II = moments(path) if moments is not None and config.init == "qera" else None
    if heard_II is not None:
        return initial.qera(original_OI, lambda _: weight_OI, heard_II, rank, scale, name)
    return initial.loftq(original_OI, lambda _: weight_OI, rank, scale, name)


def _as_matrix(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """[O, I] of a weight in its module's own orientation."""
    return weight.detach().T if isinstance(module, Conv1D) else weight.detach().flatten(1)


def _place(layer: Any, factors: LowRank) -> None:
    """Make ``factors`` the parameters of ``layer``; PEFT's convolutions, which copy the base's class, become plain ones."""
    base, device = layer.base_layer, layer.lora_A[ADAPTER].weight.device
    a, b = factors.a_RI, factors.b_OR
    if isinstance(base, nn.Conv2d):
        with torch.device("meta"):
            layer.lora_A[ADAPTER] = nn.Conv2d(base.in_channels, factors.rank, base.kernel_size, base.stride, base.padding, bias=False)  # type: ignore[arg-type]
            layer.lora_B[ADAPTER] = nn.Conv2d(factors.rank, base.out_channels, 1, bias=False)
        a, b = a.view(factors.rank, base.in_channels, *base.kernel_size), b[:, :, None, None]
    layer.lora_A[ADAPTER].weight = nn.Parameter(a.to(device).contiguous())
    layer.lora_B[ADAPTER].weight = nn.Parameter(b.to(device).contiguous())


def _subtract(layer: Any, factors: LowRank) -> None:
    """Let the frozen layer take away what the adapter starts with; the scale is folded in, in fp32 where it would not be exact."""
    device = layer.lora_A[ADAPTER].weight.device
    wide = factors.b_OR.float() * layer.scaling[ADAPTER]
    narrow = wide.to(factors.b_OR.dtype)
    b_OR = narrow if torch.equal(narrow.float(), wide) else wide
    layer.base_layer.offset = LowRank(factors.a_RI.to(device), b_OR.to(device))


def trainable_parameters(peft_model: PeftModel) -> dict[str, nn.Parameter]:
    """Every trainable parameter by the key that PEFT's files have for it."""
    return {stored_key(name): parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}


def stored_key(name: str) -> str:
    """A parameter's name in a PEFT model as its files spell it: without the adapter's name."""
    return _ADAPTER_PART.sub(r".\1", name.replace(f".modules_to_save.{ADAPTER}", "")).replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


@torch.no_grad()
def adapter_state(
    peft_model: PeftModel, values: Mapping[str, torch.Tensor] | None = None, *, base_model: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What an adapter folder holds: the configuration and the tensors, on the CPU in ``dtype``.

    ``values``: wider copies of the parameters, by the keys of :func:`trainable_parameters`; those not given are taken from the model.
    ``base_model``: recorded as the base. Stock PEFT loads the result on the stock base, whatever the start was.
    """
    wide = {key: parameter.detach() for key, parameter in trainable_parameters(peft_model).items()} | dict(values or {})
    tensors = {key: value.to("cpu", dtype, copy=True).contiguous() for key, value in wide.items()}
    targets, alphas = [], {}
    peft = peft_model.peft_config[ADAPTER]
    assert isinstance(peft, LoraConfig)
    for path, layer in lora_layers(peft_model).items():
        offset, scale = getattr(layer.base_layer, "offset", None), layer.scaling[ADAPTER]
        a_key, b_key = f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"
        if offset is not None:
            a, b = tensors[a_key], tensors[b_key]
            a0, b0 = offset.a_RI.to("cpu", dtype), (offset.b_OR.cpu().float() / scale).to(dtype)
            tensors[a_key] = torch.cat([a, a0.view(-1, *a.shape[1:])])
            tensors[b_key] = torch.cat([b, -b0.view(b.shape[0], -1, *b.shape[2:])], dim=1)
        rank = tensors[a_key].shape[0]
        targets.append(_target(path, layer.base_layer, rank))
        alphas[path] = _round(scale * (math.sqrt(rank) if peft.use_rslora else rank))
    model = peft_model.get_base_model()
    paths = [path for path, _ in model.named_modules() if path and not _INSIDE_ADAPTER.search(path)]
    config = adapter_config(targets, paths, modules_to_save=peft.modules_to_save or (), base_model=base_model, task_type=peft.task_type)
    common = max(sorted(set(alphas.values())), key=list(alphas.values()).count)
    config |= {
        "lora_alpha": common,
        "alpha_pattern": {f"^{re.escape(path)}": alpha for path, alpha in alphas.items() if alpha != common},
        "use_rslora": peft.use_rslora,
        "use_dora": peft.use_dora,
        "lora_dropout": peft.lora_dropout,
    }
    return config, tensors


def _target(path: str, base: nn.Module, rank: int) -> Target:
    outputs, inputs = sides(base)
    if isinstance(base, nn.Conv2d):
        return Target(path, (outputs, base.in_channels, *base.kernel_size), rank)
    transposed = isinstance(base, Conv1D)
    return Target(path, (inputs, outputs) if transposed else (outputs, inputs), rank, transposed=transposed)


def _round(alpha: float) -> int | float:
    """alpha without the noise of having been divided and multiplied again; whole where it is whole."""
    near = round(alpha, 9)
    return int(near) if near.is_integer() else near


def save_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into an existing folder; the same content gives the same bytes."""
    portable_peft.write(folder, portable_peft.PeftContent(config, tensors))
