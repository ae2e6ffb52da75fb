"""Which GPU is meant: by number as CUDA counts them, or by UUID, whole or its beginning.

``CUDA_VISIBLE_DEVICES`` is obeyed as CUDA obeys it, so ``cuda:0`` is the first GPU that a program started here would see. Numbers follow
the PCI bus, which is how the driver lists GPUs and what the workers are told to use (``CUDA_DEVICE_ORDER``). A GPU that is divided (MIG) is
its parts: CUDA runs on one of them, never on the whole.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_tools.errors import MissingError, UsageError

_UUID = re.compile(r"(GPU|MIG)-[0-9a-fA-F/-]+")
_NUMBERED = re.compile(r"cuda(?::(\d+))?")


@dataclass(frozen=True)
class Card:
    """A GPU of the machine. ``parts``: the UUIDs of its MIG devices; a divided GPU without any cannot be used at all."""

    uuid: str
    name: str
    is_divided: bool = False
    parts: tuple[str, ...] = ()

    @property
    def usable(self) -> tuple[str, ...]:
        return self.parts if self.is_divided else (self.uuid,)


def choose(device: str, cards: Sequence[Card], visible: str | None) -> str:
    """The UUID of the GPU or MIG device that ``device`` names. ``visible``: the value of ``CUDA_VISIBLE_DEVICES``, ``None`` if unset.

    Raises:
        UsageError: no name of a GPU, or the beginning of several. MissingError: no such GPU, or not visible.
    """
    numbered = _NUMBERED.fullmatch(device)
    if numbered is None and not _UUID.fullmatch(device):
        raise UsageError(f"device `{device}` is no GPU", hint="write cuda, cuda:<number> or the UUID that `nvidia-smi -L` shows")
    if numbered is None:
        return _by_uuid(device, cards)
    seen, number = shown(cards, visible), int(numbered.group(1) or 0)
    if number >= len(seen):
        because = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible!r}"
        raise MissingError(f"device `{device}`: {len(seen)} GPUs are visible{because}", hint=_what_there_is(cards))
    return seen[number]


def shown(cards: Sequence[Card], visible: str | None) -> list[str]:
    """UUIDs in the order in which CUDA numbers them; the first entry of ``visible`` that fits nothing ends the list, as in CUDA."""
    if visible is None:
        return [uuid for card in cards for uuid in card.usable]
    found: list[str] = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdecimal():
            matches = list(cards[int(entry)].usable[:1]) if int(entry) < len(cards) else []
        else:
            matches = _beginning(entry, cards) if entry else []
        if len(matches) != 1:
            break
        found.append(matches[0])
    return found


def _by_uuid(device: str, cards: Sequence[Card]) -> str:
    matches = _beginning(device, cards)
    if len(matches) == 1:
        return matches[0]
    divided = next((card for card in cards if card.is_divided and card.uuid.startswith(device)), None)
    if divided is not None:
        hint = f"name one of its parts: {', '.join(divided.parts)}" if divided.parts else "create a MIG device, or switch MIG off"
        raise MissingError(f"device `{device}` is divided (MIG), and CUDA does not run on the whole", hint=hint)
    if matches:
        raise UsageError(f"device `{device}` is the beginning of {len(matches)} GPUs", hint="write the whole UUID")
    raise MissingError(f"there is no GPU `{device}`", hint=_what_there_is(cards))


def _beginning(text: str, cards: Sequence[Card]) -> list[str]:
    return [uuid for card in cards for uuid in card.usable if uuid.startswith(text)]


def _what_there_is(cards: Sequence[Card]) -> str:
    usable = ", ".join(f"{card.name} {uuid}" for card in cards for uuid in card.usable) or "none"
    return f"usable here: {usable}" if cards else "run `nvidia-smi -L` to see what the driver has"


def confinement(uuid: str) -> dict[str, str]:
    """The environment of a process that shall see this device alone, as its ``cuda:0``."""
    return {"CUDA_VISIBLE_DEVICES": uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
