"""Everything that needs a GPU, in one command that ends in time.

Graphs beside torch with bitsandbytes, training beside PEFT, parity of every scheme, the GPU tests.

    python benchmarks/cuda.py [--budget 560] [--shapes 1b,8b] [--prompt 512] [--new 64] [--rounds 3] [--genai-python PATH] [--work DIR]
    python benchmarks/cuda.py --only "checks,1b 4 bits"                     # some of the parts; the others stay in the file as they are
    python benchmarks/cuda.py --missing                                     # go on where an earlier run ended
    python benchmarks/cuda.py --device cpu --shapes tiny --prompt 16 --new 4 --rounds 1 --skip tests,train,estimate     # does the script itself run

Needs this repository and its dependencies, one GPU, about 60 GB of disk for 8b (16 GB of bf16 weights, then one group of models at a time), and nothing from the network.
Models are random Llamas of the named shapes, drawn on the device. Parts, most important first:

    checks       every scheme of a small model exported and held against its checkpoint on the device; what a copy on the device reaches
    SHAPE 4 bits ours int4 and nf4 beside torch with bitsandbytes NF4 (and the builder's int4)
    SHAPE 8 bits ours int8 beside LLM.int8 (and the builder's int8)
    SHAPE 16 bits ours fp16 and bf16 beside torch bf16 (and the builder's fp16)
    tests        pytest -m gpu
    train        train_vs_peft.py on the device
    estimate     estimate.py on the device

Each group is one run of this package's own benchmark (`qlora_tools.bench`): fresh processes, settings in turn round by round, five figures of device memory,
energy where the driver tells it. ``--budget`` seconds are for all of it: a group stops adding rounds when the next would not fit, and a part that would not
fit at all says so ("not measured: budget"). The result file is written after every part and every round, so a run that is cut short keeps what it had. What
needs the device is done by other processes (``cuda_child.py``, the benchmark's workers): this one never opens it.

Without a way to the network, put wheels of what the machine lacks in ``wheels/`` (git ignores it) and install them there; see ``cuda_carry.md``.

Bars: every graph of ours is ahead of its counterpart in prompt, step and memory of the process. Writes ``benchmarks/results/cuda.json``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# NVIDIA's Python bindings are a namespace package of this very name, and torch looks for them: with this folder on the path it would find this file
# instead. It steps aside.
__path__ = [str(Path(entry, "cuda")) for entry in sys.path if Path(entry, "cuda").is_dir()]

if __name__ == "__main__":
    root = str(Path(__file__).resolve().parents[1])
    sys.path[:0] = [str(Path(__file__).parent), root]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))  # for the processes it starts, where nothing is installed

    from cuda_matrix import main

    main(description=__doc__)
