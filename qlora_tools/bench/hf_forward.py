"""A checkpoint that looks once, run by transformers or diffusers: what a user gets without exporting.

The class is the one that config.json names, or the one of a task. Of a model in two halves the half that reads is kept and the other let go, as the graphs
are measured. Inputs and the names of outputs are those of the graphs. Imported inside the worker only, since it brings torch with it at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qlora_tools.bench.hf_engine import config_of, loading_words, quantization_method, settled, stored_bytes
from qlora_tools.checkpoint.reader import read_json
from qlora_tools.errors import UnsupportedError
from qlora_tools.live.foreign import REFUSALS, load_foreign
from qlora_tools.models.feeds import draw_feed, reads_text
from qlora_tools.models.work import FORWARD, inputs_of_class, inputs_of_denoiser, is_of_diffusers

FACTORY = "qlora_tools.bench.hf_forward:load"
#: Fields of a model's output that are no results.
_SIDE_OUTPUTS = ("loss", "hidden_states", "attentions", "past_key_values", "cross_attentions", "encoder_", "decoder_")


def load(
    path: str,
    *,
    threads: int,
    dtype: str = "stored",
    device: str = "cpu",
    adapter: str | None = None,
    task: str | None = None,
    quantize: str | None = None,
    memory: str = "runtime",
    memory_limit: int | None = None,
) -> TorchForward:
    """Load a local folder, with options as in ``hf_engine``. ``task`` (a name of transformers' pipelines) chooses another class than config.json's.

    Raises:
        UsageError, MissingError, CorruptError: as there. UnsupportedError: no class for it, or one whose inputs cannot be drawn; no adapter and no quantization
        on a model of diffusers.
    """
    folder, config = Path(path), config_of(path)
    words = loading_words(path, config, threads=threads, dtype=dtype, device=device, quantize=quantize, memory=memory, memory_limit=memory_limit)
    processor = read_json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").is_file() else {}
    if is_of_diffusers(config):
        if adapter is not None or quantize is not None:
            what = "no adapter is put on it" if adapter is not None else f"it is not quantized to {quantize}"
            raise UnsupportedError(f"{path} is a model of diffusers: {what} here", hint="merge or quantize it first")
        return TorchForward(settled(_denoiser(folder, config, words)), config, processor, inputs_of_denoiser(config))
    loaded = load_foreign(class_of(folder, config, task), folder, config, words)
    model = settled(loaded, adapter)
    names = inputs_of_class(model.config.to_dict(), model.main_input_name, inspect.signature(model.forward).parameters)
    quantization = quantization_method(model.config)
    if config.get("is_encoder_decoder") and hasattr(model, "prepare_inputs_for_generation"):
        names = tuple(name for name in names if name != "decoder_input_ids")
        return TorchForward(model.get_encoder(), config, processor, names, part="encoder", quantization=quantization)
    return TorchForward(model, config, processor, names, quantization=quantization)


class TorchForward:
    """A :class:`~qlora_tools.bench.forward.ForwardEngine` over a loaded model, whose inputs are ``names``."""

    def __init__(
        self,
        model: Any,
        config: Mapping[str, Any],
        processor: Mapping[str, Any],
        names: tuple[str, ...],
        *,
        part: str | None = None,
        quantization: str | None = None,
    ) -> None:
        self._model, self._config, self._processor, self._names = model, config, processor, names
        self._part, self._quantization = part, quantization
        self._device = next(model.parameters()).device
        self._fixed = {name: value for name, value in {"return_dict": True, "use_cache": False}.items() if name in inspect.signature(model.forward).parameters}

    def feed(self, case: Mapping[str, Any], seed: int, given: Mapping[str, NDArray[Any]] | None = None) -> dict[str, torch.Tensor]:
        """Inputs on the device, floats in the model's own dtype."""
        sizes = {"batch": int(case["batch"]), "length": int(case["prompt_tokens"])}
        drawn = draw_feed(self._names, self._config, seed=seed, processor=self._processor, given=given, **sizes)
        tensors = {name: torch.from_numpy(content).to(self._device) for name, content in drawn.items()}
        return {name: tensor.to(self._model.dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    @torch.inference_mode()
    def forward(self, feed: Mapping[str, torch.Tensor]) -> Any:
        added = {name: feed[name] for name in ("text_embeds", "time_ids") if name in feed}
        plain = {name: tensor for name, tensor in feed.items() if name not in added}
        outputs = self._model(**plain, **({"added_cond_kwargs": added} if added else {}), **self._fixed)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return outputs

    def read(self, outputs: Any) -> dict[str, NDArray[Any]]:
        fields = {"out_sample": outputs.sample} if is_of_diffusers(self._config) else dict(outputs.items())
        tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor) and not name.startswith(_SIDE_OUTPUTS)}
        return {name: np.array((tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()) for name, tensor in tensors.items()}

    def info(self) -> Mapping[str, Any]:
        facts = {
            "work": FORWARD,
            "runtime": "diffusers" if is_of_diffusers(self._config) else "transformers",
            "device": str(self._device),
            "weights_bytes": stored_bytes(self._model),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "quantization": self._quantization,
            "prompt": None if reads_text(self._names) else "ignored",
            "part": self._part,
        }
        return {name: value for name, value in facts.items() if value is not None}

    def close(self) -> None:
        self._model = None


def class_of(folder: Path, config: Mapping[str, Any], task: str | None = None) -> Any:
    """The class of transformers that the config names, unless it is for another task than ``task``; then the one for that.

    Raises:
        UnsupportedError: neither names one.
    """
    import transformers

    architecture = str((config.get("architectures") or [""])[0])
    named = getattr(transformers, architecture, None) if architecture else None
    tasks = {} if task is None else _classes_by_task(folder)
    if task in tasks and named not in tasks[task] and (named is None or any(named in classes for classes in tasks.values())):
        return tasks[task][0]
    if named is None:
        known = f"`{architecture}`, which transformers does not have" if architecture else "no architecture"
        raise UnsupportedError(f"{folder}/config.json names {known}", hint="check `architectures` in config.json")
    return named


def _classes_by_task(folder: Path) -> dict[str, list[Any]]:
    """What pipelines of transformers would run this type of model as; a class that serves no task, such as one with a projection, is in none."""
    import transformers
    from transformers.pipelines import SUPPORTED_TASKS

    try:
        kind = type(transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    except REFUSALS as error:
        raise UnsupportedError(f"{folder}: transformers cannot read its config.json: {str(error)[:300]}", hint="check config.json") from error
    found: dict[str, list[Any]] = {}
    for task, facts in SUPPORTED_TASKS.items():
        mapped = [auto._model_mapping[kind] for auto in facts["pt"] if kind in auto._model_mapping]
        classes = [owner for one in mapped for owner in (one if isinstance(one, (tuple, list)) else [one])]
        if classes:
            found[task] = classes
    return found


def _denoiser(folder: Path, config: Mapping[str, Any], words: Mapping[str, Any]) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UnsupportedError("a model of diffusers needs the package diffusers", hint="pip install diffusers") from error
    owner = getattr(diffusers, str(config["_class_name"]), None)
    if owner is None or not str(config["_class_name"]).startswith("UNet2D"):
        raise UnsupportedError(f"diffusers' `{config['_class_name']}` is not run here", hint="run are UNet2DConditionModel and UNet2DModel")
    given: dict[str, Any] = {} if words["dtype"] == "auto" else {"torch_dtype": words["dtype"]}
    given |= {name: words[name] for name in ("local_files_only", "use_safetensors")}  # with the latter diffusers unpickles nothing
    return load_foreign(owner, folder, config, given, library="diffusers").to(words["device_map"][""])
