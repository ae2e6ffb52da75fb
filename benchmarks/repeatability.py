"""Does a benchmark say the same twice? Two runs of one matrix, and one setting beside itself.

    python benchmarks/repeatability.py [--model DIR | --shape 110m] [--rounds 5] [--work DIR]

Exports of fp32, int8 and int4, and a copy of the first, are measured twice by `qlt bench`, settings interleaved over rounds of fresh processes. Bars: every ratio of a setting's
time to the first one's agrees within 5 % between the two runs; the copy ties with what it is a copy of; identities of memory hold. Writes
``benchmarks/results/repeatability.json``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measured import public_arguments, write_result
from synthetic import SHAPES, write_base, write_tokenizer

from qlora_tools import api
from qlora_tools.bench.pairs import agreement
from qlora_tools.bench.rows import identities_of

SCHEMES = ("fp32", "int8", "int4")
BARS = {"agreement": 0.05}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shape", default="110m", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=33)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as text:
        records = measured_twice(Path(text), options)
    found = agreement(*records)
    copies = [item["verdict"] for record in records for item in record.comparisons if item["a"] == "copy"]
    identities = [identity.held for record in records for row in record.rows for identity in identities_of(row)]
    result = {
        "bars": BARS,
        "largest_difference": found.largest,
        "ratios": [
            {"setting": one.setting, "metric": one.metric, "first_run": one.one, "second_run": one.other, "difference": one.difference} for one in found.ratios
        ],
        "copy_against_itself": copies,
        "identities": {"held": identities.count(True), "broken": identities.count(False), "unknown": identities.count(None)},
        "notes": [note for record in records for note in record.notes],
    }
    for line in result["ratios"]:
        print(f"{line['setting']:6s} {line['metric']:8s} {line['first_run']:.3f} {line['second_run']:.3f}  {100 * line['difference']:.1f} %")
    print(f"largest difference {100 * (found.largest or 0):.1f} % (wanted 5 %), a copy beside itself: {', '.join(copies)}; {result['identities']}")
    print(write_result("repeatability", f"python benchmarks/repeatability.py {public_arguments()}", result))


def measured_twice(work: Path, options: argparse.Namespace) -> list:
    model = options.model
    if model is None:
        model = work / "base"
        write_base(model, options.shape)
        write_tokenizer(model, SHAPES[options.shape]["vocab_size"])
    folders = [api.export(model=model, scheme=scheme, device="cpu", verify=False, output=work / scheme).output for scheme in SCHEMES]
    shutil.copytree(folders[0], work / "copy")
    workload = api.Workload(cases=(api.Case(options.prompt, options.new),), repeats=3)
    runs = []
    for number in range(2):
        done = api.bench(
            models=[*folders, work / "copy"],
            workload=workload,
            rounds=options.rounds,
            threads=options.threads,
            quality=False,
            device="cpu",
            output=work / f"run-{number}",
        )
        assert done.record is not None
        runs.append(done.record)
    return runs


if __name__ == "__main__":
    main()
