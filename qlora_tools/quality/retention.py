"""How much of a fine-tune's gain a compressed model keeps.

``log(ppl_base / ppl_x) / log(ppl_base / ppl_tuned)``: 1 keeps everything, 0 is the untouched base, below 0
is worse than the base. It is a ratio of log-likelihood gains, so it does not depend on the perplexity's scale.
"""

from __future__ import annotations

import math

from qlora_tools.errors import UsageError

#: A gain below this many nats per token is noise on any text of the sizes used here; the ratio would only magnify it.
SMALLEST_GAIN_NATS = 1e-3


def retention(ppl_base: float, ppl_tuned: float, ppl_x: float) -> float | None:
    """The kept share, or ``None`` where the fine-tune gained nothing on this text.

    Raises:
        UsageError: a perplexity below 1 or not finite.
    """
    for name, value in (("base", ppl_base), ("tuned", ppl_tuned), ("x", ppl_x)):
        if not (math.isfinite(value) and value >= 1.0):
            raise UsageError(f"perplexity of {name} is {value}, expected a finite number of 1 or more")
    gain = math.log(ppl_base / ppl_tuned)
    return math.log(ppl_base / ppl_x) / gain if gain >= SMALLEST_GAIN_NATS else None
