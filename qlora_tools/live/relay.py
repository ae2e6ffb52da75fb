"""Many forward passes of one model side by side, in step: all of them reach a stop before any goes through it.

A forward pass is the model's own code, which knows what masks and position embeddings its blocks want. To run one block for
all batches before the next block is needed, each pass lives in a thread of its own that sleeps whenever it calls a *stop* (a block, an
embedding, the head). The driver computes the stop's result and wakes the thread with it. Only one thread ever runs at a
time, and the heavy work is done by the driver.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Call:
    """A stop that a pass has reached: which, and with what."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Finished(BaseException):
    """Raised inside a pass to end it early; no model catches it."""


_STOP = object()


class Passage:
    """One forward pass. ``call`` is what it waits for, ``None`` once it has ended; ``result`` is what the model returned, if it came to that."""

    def __init__(self, number: int, forward: Callable[[], Any], *, grad: bool = False) -> None:
        self.number = number
        self.call: Call | None = None
        self.result: Any = None
        self._forward, self._grad = forward, grad
        self._error: BaseException | None = None
        self._value: Any = None
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=f"pass-{number}", daemon=True)

    def start(self) -> None:
        """Run to the first stop."""
        threads = torch.get_num_threads()
        self._thread.start()
        self._wait()
        torch.set_num_threads(threads)

    def resume(self, value: Any) -> None:
        """Hand over the stop's result and run to the next one.

        Raises: whatever the model raised on the way.
        """
        assert self.call is not None
        self.call, self._value = None, value
        self._go.release()
        self._wait()

    def stop(self) -> None:
        """End the pass where it stands."""
        if self.call is not None:
            self.resume(_STOP)

    def _wait(self) -> None:
        self._stopped.acquire()
        if self.call is None:
            self._thread.join()
            if self._error is not None:
                error, self._error = self._error, None
                raise error

    def _run(self) -> None:
        _current.passage = self
        torch.set_num_threads(1)  # else every passage keeps a pool of its own, as large as the machine, for the little it does itself
        try:
            with torch.set_grad_enabled(self._grad):
                self.result = self._forward()
        except Finished:
            pass
        except BaseException as error:  # noqa: BLE001 (raised again where the driver waits)
            self._error = error
        finally:
            _current.passage = None
            self.call = None
            self._stopped.release()

    def ask(self, call: Call) -> Any:
        """From inside the thread: wait until the driver has the result of ``call``."""
        self.call = call
        del call
        self._stopped.release()
        self._go.acquire()
        value, self._value = self._value, None
        if value is _STOP:
            raise Finished
        return value


_current = threading.local()


def intercept(module: Any, path: str) -> Callable[..., Any]:
    """Make ``module`` a stop: inside a passage its forward asks the driver. Returns the forward it had; outside of passages that runs as ever."""
    original: Callable[..., Any] = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        passage = getattr(_current, "passage", None)
        return original(*args, **kwargs) if passage is None else passage.ask(Call(path, args, kwargs))

    module.forward = forward
    return original


def release(module: Any) -> None:
    """Undo :func:`intercept`."""
    del module.forward


def end(passages: Iterable[Passage]) -> None:
    """Stop whatever still runs, quietly: used on the way out of an error."""
    for passage in passages:
        with suppress(Exception):  # one error is on its way already; what unwinding a pass raises besides is of no interest
            passage.stop()
