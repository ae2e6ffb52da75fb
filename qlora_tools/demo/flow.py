"""``qlt demo``: the whole chain on one pair of models, ending in one table and one page.

extract -> quantize -> merge (dense, NF4, and into the NF4 weights alone: rounded to the nearest point, to see it fail, and with their grid kept in view)
-> export fp32, int8, int4 -> bench. On the pair that the demo trains itself there is text, and three more rows: a LoRA trained over the NF4 base
for as many steps as the fine-tune, the extracted adapter refined, and an int4 graph of that one with codes chosen by calibration.
Everything is judged against the tuned model itself, so that the table shows what each step keeps of the fine-tune.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_tools.bench.record import Case, Workload
from qlora_tools.checkpoint.hub import resolve_model
from qlora_tools.demo.pair import STANDARD, Pair, Recipe, make_pair
from qlora_tools.errors import UsageError
from qlora_tools.progress import SILENT, Progress
from qlora_tools.stages.extract import ExtractConfig
from qlora_tools.training.config import TrainConfig
from qlora_tools.training.distill_config import RefineConfig
from qlora_tools.verbs.bench import BenchResult, bench, layers_of
from qlora_tools.verbs.export import ExportResult, export
from qlora_tools.verbs.extract import ExtractResult, extract
from qlora_tools.verbs.merge import MergeConfig, MergeResult, merge
from qlora_tools.verbs.quantize import QuantizeResult, quantize
from qlora_tools.verbs.refine import RefineResult, refine
from qlora_tools.verbs.train import TrainResult, train

EXPORTS = ("fp32", "int8", "int4")
#: Enough samples for a p95, and no more: a demo should not take longer to measure than to train.
QUICK = Workload((Case(128, 33),), repeats=2, most_warmup=3)

_TRAINED, _TRAINED_RANK, _TRAINED_LR = "trained-lora", 8, 2e-3
_REFINED, _REFINED_ADAPTER = "refined-nf4", "adapter-refined"


@dataclass(frozen=True)
class DemoResult:
    """What each step gave, in the order in which they ran. ``pair`` is ``None`` where the models were given."""

    folder: Path
    pair: Pair | None
    extracted: ExtractResult
    quantized: QuantizeResult
    merged: MergeResult
    requantized: MergeResult
    on_grid: MergeResult
    kept_grid: MergeResult
    trained: TrainResult | None
    refined: RefineResult | None
    exported: tuple[ExportResult, ...]
    benched: BenchResult
    seconds: float


def demo(
    *,
    base: str | Path | None = None,
    tuned: str | Path | None = None,
    text: Path | None = None,
    rank: int = 16,
    rounds: int = 2,
    folder: Path = Path("demo"),
    recipe: Recipe = STANDARD,
    threads: int | None = None,
    device: str = "auto",
    command: Sequence[str] = (),
    after: Callable[[str, Any], None] = lambda step, result: None,
    progress: Progress = SILENT,
) -> DemoResult:
    """Run the chain into ``folder``, replacing what an earlier demo left there; ``after(step, result)`` hears of each step.

    Without ``base`` and ``tuned`` a pair is trained first (about a minute on two cores), or reused from ``folder``.
    """
    began = time.perf_counter()
    if (base is None) != (tuned is None):
        raise UsageError("a pair is a base and a tuned model", hint="give both --base and --tuned, or neither to train a small pair")
    pair = None
    if base is None or tuned is None:
        pair = make_pair(folder / "models", recipe=recipe, progress=progress)
        after("train", pair)
        base, tuned, text = pair.base, pair.tuned, text or pair.heldout_prose
    base, tuned = resolve_model(str(base)), resolve_model(str(tuned))

    def step(name: str, result: Any) -> Any:
        after(name, result)
        return result

    common: dict[str, Any] = {"force": True, "device": device, "progress": progress}
    adapter, base_nf4 = folder / f"adapter-r{rank}", folder / "base-nf4"
    extracted = step("extract", extract(base=base, tuned=tuned, config=ExtractConfig(rank=rank), output=adapter, **common))
    quantized = step("quantize", quantize(model=base, scheme="nf4", output=base_nf4, **common))
    pairs = [(adapter, 1.0)]
    merged = step("merge", merge(base=base, adapters=pairs, output=folder / "merged", **common))
    requantized = step("merge to NF4", merge(base=base, adapters=pairs, scheme="nf4", output=folder / "merged-nf4", **common))
    erasing = MergeConfig(method="requant", anyway=True)
    on_grid = step(
        "merge onto the NF4 grid", merge(base=base_nf4, adapters=pairs, scheme="nf4", config=erasing, output=folder / "merged-on-grid-nf4", **common)
    )
    kept_grid = step("merge, the grid kept", merge(base=base_nf4, adapters=pairs, scheme="nf4", output=folder / "merged-kept-grid-nf4", **common))
    trained = step("train a LoRA", _train(pair, folder, common)) if pair is not None else None
    refined = step("refine", _refine(pair, adapter, folder, common)) if pair is not None else None
    exported = tuple(
        step(f"export {scheme}", export(base=base, adapters=pairs, scheme=scheme, output=folder / f"onnx-{scheme}", **common)) for scheme in EXPORTS
    )
    checkpoints = [base, tuned, *(folder / name for name in ("merged", "merged-nf4", "merged-on-grid-nf4", "merged-kept-grid-nf4"))]
    if pair is not None:
        checkpoints += [folder / _TRAINED, folder / _REFINED]
        calibrated: dict[str, Any] = {"scheme": "int4", "calib": pair.prose, "output": folder / "onnx-int4-refined"}
        exported += (step("export int4, calibrated", export(base=base, adapters=[(folder / _REFINED_ADAPTER, 1.0)], **calibrated, **common)),)
    benched = bench(
        models=[*checkpoints, *(result.output for result in exported)],
        reference=tuned,
        untuned=base,
        text=text,
        workload=QUICK,
        quality_tokens=2048,
        rounds=rounds,
        threads=threads,
        layers=layers_of(adapter),
        title="What each step keeps, costs and gains",
        output=folder / "bench",
        command=command,
        **common,
    )
    after("bench", benched)
    return DemoResult(
        folder, pair, extracted, quantized, merged, requantized, on_grid, kept_grid, trained, refined, exported, benched, time.perf_counter() - began
    )


def _train(pair: Pair, folder: Path, common: dict[str, Any]) -> TrainResult:
    """A LoRA by the fine-tune's own schedule, merged into the weights it has seen: the dequantized ones."""
    schedule = pair.finetune
    config = TrainConfig(
        rank=_TRAINED_RANK, lr=_TRAINED_LR, steps=schedule.steps, batch=schedule.batch, max_len=schedule.context, schedule="linear", warmup=0.05
    )
    adapter = folder / f"adapter-trained-r{_TRAINED_RANK}"
    trained = train(base=pair.base, data=pair.prose, config=config, output=adapter, **common)
    merge(base=pair.base, adapters=[(adapter, 1.0)], config=MergeConfig(target="trained"), output=folder / _TRAINED, **common)
    return trained


def _refine(pair: Pair, adapter: Path, folder: Path, common: dict[str, Any]) -> RefineResult:
    """The extracted adapter distilled over the NF4 base on the fine-tune's text, and merged into fresh NF4."""
    config = RefineConfig(text=str(pair.prose), length=pair.finetune.context)
    refined = refine(adapter=adapter, base=pair.base, teacher=pair.tuned, config=config, output=folder / _REFINED_ADAPTER, **common)
    merge(base=pair.base, adapters=[(folder / _REFINED_ADAPTER, 1.0)], scheme="nf4", output=folder / _REFINED, **common)
    return refined
