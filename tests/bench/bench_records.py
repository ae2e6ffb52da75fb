"""A record as a benchmark would leave it, for the tests of what is drawn from it."""

import json
from dataclasses import replace

from qlora_tools.bench.record import Attempt, BenchRecord, Case, Layer, Quality, Row, Setting, Workload
from qlora_tools.bench.rows import summarise_row


def attempt(number, step_s, steps=64, repeats=5):
    reading = {"peak_bytes": 50_000_000, "rss_bytes": 40_000_000, "anon_bytes": 30_000_000, "file_bytes": 10_000_000, "pss_bytes": 38_000_000}
    return Attempt(
        round=number,
        status="ok",
        reason=None,
        wall_s=2.0,
        cpu_s=1.5,
        cpu_stall=0.01,
        import_s=0.5,
        load_s=0.1 + number / 100,
        warmup_s=(1.0, 1.0, 1.0),
        is_steady=True,
        prefill_s=tuple(10 * step_s + i * 1e-5 for i in range(repeats)),
        ttft_s=tuple(10 * step_s + i * 1e-5 for i in range(repeats)),
        decode_s=tuple(tuple(step_s + (i + j) * 1e-7 for j in range(steps)) for i in range(repeats)),
        total_s=(step_s * steps,) * repeats,
        memory={"imported": reading, "loaded": {**reading, "peak_bytes": 60_000_000}, "steady": reading, "peak_was_reset": True},
        info={"weights_bytes": 9_000_000, "vocab_size": 32},
    )


def figures(kl, top1):
    return {
        "kl_mean": kl,
        "top1_agreement": top1,
        "ppl_candidate": 100.0 + kl,
        "retention": 1 - kl,
        "ci95": {"kl_mean": [0.9 * kl, 1.1 * kl], "top1_agreement": None},
        "corpus": {"name": "text", "sha256": "ab" * 32},
        "method": {"name": "disjoint windows of 256 tokens", "n_tokens": 4096},
    }


def make_record(**changes):
    spec = (("fp32", "ONNX fp32", 40, 4e-3, 0.0, 1.0), ("int8", "int8 <fast> & |small|", 11, 2e-3, 0.004, 0.98), ("slow", "slow", 20, 9e-3, 0.02, 0.95))
    workload = Workload()
    settings, rows, quality = [], [], []
    for name, label, megabytes, step_s, kl, top1 in spec:
        settings.append(Setting(name, "engines:load", {"folder": name}, label=label, export=f"qlt export --{name}"))
        row = summarise_row(settings[-1], workload.cases[0], [attempt(i, step_s) for i in range(3)])
        rows.append(replace(row, file_bytes=megabytes * 10**6, unknown={}))
        quality.append(Quality(name, "fp32", "ok", None, figures(kl, top1)))
    settings.append(Setting("big", "engines:load"))
    rows.append(Row("big", Case(), "oom", "MemoryError: no room", (Attempt(0, "oom", "MemoryError: no room", 1.0, None, None),)))
    quality.append(Quality("big", "fp32", "oom", "not judged: MemoryError: no room"))
    layers = [
        Layer(f"model.layers.{i}.{kind}", (8, 8), 2 + i, 0.8 + i / 10, 0.95, 0.1, (4.0, 2.0, 1.0))
        for i in range(2)
        for kind in ("self_attn.q_proj", "mlp.up_proj")
    ]
    record = BenchRecord(
        created="2026-01-02T03:04:05Z",
        command=("qlt", "bench"),
        machine={"cpu": "A <CPU>", "cores": 2, "ram_bytes": 8 << 30, "system": "Linux", "kernel": "6", "architecture": "x86_64", "python": "3.11"},
        versions={"torch": "2.13.0"},
        workload=workload,
        rounds=3,
        threads=1,
        settings=tuple(settings),
        rows=tuple(rows),
        quality=tuple(quality),
        comparisons=({"a": "int8", "b": "slow", "metric": "kl", "effect": 0.2, "ci95": [0.1, 1.1], "n_pairs": 16, "verdict": "tie"},),
        layers=tuple(layers),
        notes=("a note",),
        title="A <title>",
    )
    return replace(record, **changes)


def changed(change):
    """The stored bytes of a record after ``change`` was done to its plain value."""
    value = json.loads(make_record().to_json())
    change(value)
    return json.dumps(value).encode()
