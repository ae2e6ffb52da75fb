"""Engines for the worker processes of the tests: a table of logits, and ways to fail."""

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np

VOCABULARY = 32


class TableEngine:
    def __init__(self, noise=0.0, ballast_bytes=0, step_s=0.0):
        self.table = np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY)) + noise * np.random.default_rng(1).standard_normal(
            (VOCABULARY, VOCABULARY)
        )
        self.ballast = np.ones(ballast_bytes, np.uint8)
        self.step_s = step_s
        self.fed = []

    def prefill(self, ids_BT):
        self.fed = [ids_BT]
        return self.table[ids_BT[:, -1]]

    def decode(self, tokens_B):
        time.sleep(self.step_s)
        self.fed.append(tokens_B)
        return self.table[tokens_B]

    def score(self, ids_BT):
        return self.table[ids_BT]

    def info(self):
        return {"vocab_size": VOCABULARY, "weights_bytes": self.table.nbytes, "runtime": "table"}

    def close(self):
        pass


def load(*, threads, noise=0.0, ballast_bytes=0, step_s=0.0):
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
    return TableEngine(noise, ballast_bytes, step_s)


def spiky(*, threads, spike_bytes):
    """Needs far more while loading than afterwards."""
    np.ones(spike_bytes, np.uint8)
    return TableEngine()


def out_of_memory(*, threads):
    raise MemoryError("no room for 12 GB")


def runtime_out_of_memory(*, threads):
    raise RuntimeError("[ONNXRuntimeError] : 6 : bad allocation: Failed to allocate memory for requested buffer of size 99")


def unsupported(*, threads):
    from qlora_tools.errors import UnsupportedError

    raise UnsupportedError("no kernel for this")


def crash(*, threads):
    sys.stderr.write("about to go\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)


def killed(*, threads):
    os.kill(os.getpid(), signal.SIGKILL)


def bounded(*, threads):
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    np.ones(4 << 30, np.uint8)


def exits(*, threads):
    sys.stderr.write("gone early\n")
    sys.stderr.flush()
    os._exit(7)


def hang(*, threads, pid_file):
    """Hangs, with a child of its own."""
    child = subprocess.Popen(["sleep", "600"])
    with open(pid_file, "w") as stream:  # noqa: PTH123
        stream.write(f"{os.getpid()} {child.pid}")
    time.sleep(600)


class FailsAt(TableEngine):
    """Works, but not on ``batch`` sequences."""

    def __init__(self, batch, how):
        super().__init__()
        self.batch, self.how = batch, how

    def prefill(self, ids_BT):
        if len(ids_BT) == self.batch:
            if self.how == "memory":
                resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
                np.ones(4 << 30, np.uint8)
            elif self.how == "time":
                time.sleep(600)
            else:
                os.kill(os.getpid(), getattr(signal, self.how))
        return super().prefill(ids_BT)


def fails_at(*, threads, batch, how):
    return FailsAt(batch, how)


class OnceEngine:
    """Looks once: no tokens, no past."""

    def feed(self, case, seed, given=None):
        return np.random.default_rng(seed).standard_normal((case["batch"], 4))

    def forward(self, feed):
        self.outputs = feed * 2

    def info(self):
        return {"work": "forward", "prompt": "ignored", "weights_bytes": 16}

    def close(self):
        pass


def looks_once(*, threads):
    return OnceEngine()


def fails_once(*, threads, flag_file):
    """Dies in the first process and works in the later ones."""
    if not os.path.exists(flag_file):  # noqa: PTH110
        open(flag_file, "w").close()  # noqa: PTH123
        raise ValueError("first time")
    return TableEngine()


def mean_probe(engine, reference, options):
    ids = np.asarray([options["ids"]])
    return {"difference": float(np.abs(engine.score(ids) - reference.score(ids)).mean())}
