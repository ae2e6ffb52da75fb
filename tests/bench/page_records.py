"""Richer records for the tests of what is drawn: several cases, an accelerator, contradictions and gaps, and a model that only looks forward."""

from dataclasses import replace

from bench_records import attempt, figures, make_record

from qlora_tools.bench.record import BenchRecord, Case, DeviceMemory, Identity, Layer, Quality, Row, Setting, Workload
from qlora_tools.bench.rows import summarise_row

CASES = tuple(Case(prompt, 65, batch) for prompt in (128, 512, 2048) for batch in (1, 4, 16))
SPEC = (  # id, name, file MB, seconds per step, KL, top-1
    ("fp16", "ONNX fp16", 3100, 9.1e-3, 0.0, 1.0),
    ("w8a8", "ONNX w8a8", 1650, 5.2e-3, 6.4e-4, 0.985),
    ("int8", "ONNX int8", 1640, 6.0e-3, 2.6e-4, 0.991),
    ("nf4", "ONNX nf4, searched", 910, 4.4e-3, 0.031, 0.93),
    ("int4", "ONNX int4", 930, 4.1e-3, 0.055, 0.91),
    ("torch-nf4", "torch nf4 (bitsandbytes)", 940, 31e-3, 0.034, 0.925),
    ("torch-bf16", "torch bf16", 3100, 22e-3, 1.1e-4, 0.996),
)


def device_memory(megabytes, case):
    """What adds up, in bytes: nothing contradicts anything else."""
    weights = megabytes * 1_000_000
    arena = weights + case.batch * (case.prompt_tokens + case.new_tokens) * 60_000
    return DeviceMemory(
        weights_bytes=weights,
        arena_peak_bytes=arena,
        context_bytes=310_000_000,
        process_peak_bytes=arena + 420_000_000,
        as_deployed_peak_bytes=int(1.6 * arena) + 420_000_000,
        smallest_limit_bytes=int(1.02 * arena),
        method="bracket",
        residual_bytes=2_000_000,
        identities=(Identity("arena at least weights", weights, arena, None, True),),
    )


def swept_row(setting, case, megabytes, step_s):
    scale = step_s * case.batch**0.4 * (1 + case.prompt_tokens / 4096)
    row = summarise_row(setting, case, [attempt(i, scale) for i in range(6)])  # as many processes as an interval needs
    prefill = replace(row.prefill, p50_s=scale * case.prompt_tokens * case.batch / 100, ci95_p50_s=None)
    return replace(
        row,
        file_bytes=megabytes * 10**6,
        weights_bytes=megabytes * 10**6,
        memory=replace(row.memory, peak_bytes=int(1.1e6 * megabytes) + 200_000 * case.batch * case.prompt_tokens // 10),
        prefill=prefill,
        prefill_tokens_per_s=case.batch * case.prompt_tokens / prefill.p50_s,
        device_memory=device_memory(megabytes, case),
        energy_j=40 * step_s / case.batch,
        unknown={},
    )


def compared(setting, case, metric, ratio, verdict):
    at = [case.batch, case.prompt_tokens, case.new_tokens]
    return {"a": setting, "b": "fp16", "metric": metric, "case": at, "effect": ratio, "ci95": [0.95 * ratio, 1.05 * ratio], "n_pairs": 5, "verdict": verdict}


def make_swept(**changes) -> BenchRecord:
    """Seven settings at nine cases on an accelerator. One lacks a reading, one contradicts itself, one ran out of memory at the largest case."""
    settings, rows, quality, comparisons = [], [], [], []
    for name, label, megabytes, step_s, kl, top1 in SPEC:
        setting = Setting(name, "engines:load", {"folder": name, "device": "cuda"}, label=label, export=f"qlt export --{name}")
        settings.append(setting)
        rows += [swept_row(setting, case, megabytes, step_s) for case in CASES]
        quality.append(Quality(name, "fp16", "ok", None, figures(kl, top1)))
        if name != "fp16":
            ratio = step_s / SPEC[0][3]
            comparisons += [compared(name, case, metric, ratio, "a" if ratio < 0.95 else "b") for case in CASES for metric in ("prefill", "decode")]
    comparisons[0] = {**comparisons[0], "effect": 0.99, "ci95": [0.97, 1.02], "verdict": "tie"}
    at = {(row.setting, row.case): i for i, row in enumerate(rows)}
    last, first = CASES[-1], CASES[0]
    rows[at["torch-bf16", last]] = Row("torch-bf16", last, "oom", "CUDA out of memory", (), unknown={})
    lost = at["torch-nf4", first]
    reason = "contended: another process took memory meanwhile"
    rows[lost] = replace(
        rows[lost],
        device_memory=replace(rows[lost].device_memory, process_peak_bytes=None, residual_bytes=None),
        unknown={"device_memory.process_peak_bytes": reason, "energy_j": "the driver does not count energy"},
        energy_j=None,
    )
    wrong = at["int8", first]
    broken = Identity("process at most deployed", 4_000_000_000, 3_000_000_000, None, False)
    rows[wrong] = replace(rows[wrong], device_memory=replace(rows[wrong].device_memory, identities=(broken,)))
    layers = [
        Layer(
            f"model.layers.{i}.{kind}", (8, 8), 4 + i % 3, 0.7 + i / 60, 0.97, 0.1, tuple(4.0 * (0.6 + i / 60) ** j for j in range(16)), retention=0.9 + i / 200
        )
        for i in range(16)
        for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    machine = {**make_record().machine, "gpu": {"name": "An accelerator", "driver": "1.2", "memory_bytes": 80 << 30}}
    record = replace(
        make_record(),
        title="Llama 1 B, seven settings",
        machine=machine,
        workload=Workload(CASES),
        settings=tuple(settings),
        rows=tuple(rows),
        quality=tuple(quality),
        comparisons=tuple(comparisons),
        layers=tuple(layers),
    )
    return replace(record, **changes)


def make_forward() -> BenchRecord:
    """Two settings of an encoder: one forward, nothing written, judged by its outputs."""
    settings = (Setting("fp32", "engines:load"), Setting("w8a8", "engines:load"))
    case, rows = Case(128, 1, 8), []
    for setting, step_s in zip(settings, (2e-3, 1e-3), strict=True):
        found = [
            replace(attempt(i, step_s), decode_s=(), info={"weights_bytes": 9_000_000, "work": "forward"}) for i in range(6)
        ]  # as many processes as an interval needs
        rows.append(replace(summarise_row(setting, case, found), file_bytes=10**7))
    told = {"method": {"name": "seeded inputs", "n_inputs": 16}, "corpus": {"name": "16 drawn inputs"}, "ci95": {"relative_error": [0.01, 0.03]}}
    quality = (
        Quality("fp32", "fp32", "ok", None, {**told, "cosine_mean": 1.0, "relative_error": 0.0, "accuracy": 0.9}),
        Quality("w8a8", "fp32", "ok", None, {**told, "cosine_mean": 0.999, "relative_error": 0.02, "accuracy": 0.85}),
    )
    return replace(make_record(), workload=Workload((case,)), settings=settings, rows=tuple(rows), quality=quality, comparisons=(), layers=())
