"""Peak memory of quantize, merge and export on a synthetic 3 B checkpoint, at full depth and at a quarter of it.

    python benchmarks/memory.py [--shape 3b] [--work DIR] [--layers 28,7]

Bar: under 2 GB, and flat in the number of layers. Writes ``benchmarks/results/memory.json``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measured import measure, write_result
from synthetic import SHAPES, write_adapter, write_base, write_tokenizer

VERBS = {
    "quantize --nf4": ["quantize", "{base}", "--nf4", "-o", "{out}"],
    "quantize --int8": ["quantize", "{base}", "--int8", "-o", "{out}"],
    "merge": ["merge", "--base", "{base}", "--adapter", "{adapter}", "-o", "{out}"],
    "merge --nf4": ["merge", "--base", "{base}", "--adapter", "{adapter}", "--nf4", "-o", "{out}"],
    "export --merge --int8": ["export", "--base", "{base}", "--adapter", "{adapter}", "--merge", "--int8", "-o", "{out}"],
    "export --int4": ["export", "{base}", "--int4", "-o", "{out}"],
    "export --int4 --no-verify": ["export", "{base}", "--int4", "--no-verify", "-o", "{out}"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="3b", choices=SHAPES)
    parser.add_argument("--layers", default=None, help="comma-separated; default: all and a quarter of them")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--only", default=None, help="run the verbs whose name holds this")
    options = parser.parse_args()
    full = SHAPES[options.shape]["num_hidden_layers"]
    depths = [int(text) for text in options.layers.split(",")] if options.layers else [full // 4, full]
    rows = []
    with tempfile.TemporaryDirectory(dir=options.work) as text:
        work = Path(text)
        for depth in depths:
            base, adapter = work / f"base-{depth}", work / f"adapter-{depth}"
            write_base(base, options.shape, depth)
            write_tokenizer(base, SHAPES[options.shape]["vocab_size"])
            write_adapter(adapter, base, 16)
            for name, words in VERBS.items():
                if options.only and options.only not in name:
                    continue
                out = work / "out"
                found = measure("qlora_tools.cli", [word.format(base=base, adapter=adapter, out=out) for word in words] + ["-q"], cwd=work)
                size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.exists() else None
                rows.append({"verb": name, "layers": depth, "output_bytes": size, **found})
                print(
                    f"{name:<28} {depth:>3} layers  {found['wall_s']:7.1f} s  peak {(found['peak_bytes'] or 0) / 1e9:5.2f} GB  exit {found['returncode']} {found['stderr'][-300:]}"
                )
                shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(base)
            shutil.rmtree(adapter)
    if not options.only:
        write_result("memory", f"python benchmarks/memory.py --shape {options.shape}", {"shape": options.shape, "bar_bytes": 2_000_000_000, "rows": rows})


if __name__ == "__main__":
    main()
