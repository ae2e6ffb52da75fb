"""Data as people write it down: JSON, tables, logs, settings, sums."""

from __future__ import annotations

import json

from dealing import Dealer
from programs import FIELDS, NOUNS
from sentences import NAMES


def json_lines(deal: Dealer) -> str:
    """Objects with a nested list, one a line or spread out."""
    rows = [
        {
            "id": deal.number(1, 99999),
            "name": deal.one(NAMES),
            deal.one(FIELDS): deal.number(0, 10**4) / 100,
            "tags": deal.some(NOUNS, deal.number(1, 3)),
            "open": deal.below(2) == 1,
        }
        for _ in range(deal.number(2, 4))
    ]
    return json.dumps(rows[:2], indent=2) if deal.below(3) == 0 else "\n".join(map(json.dumps, rows))


def table(deal: Dealer) -> str:
    """Rows with a total that is right, in Markdown or separated by commas."""
    rows = [(deal.one(NOUNS), deal.number(1, 40), deal.number(100, 9999)) for _ in range(deal.number(3, 6))]
    cells = [(name, str(count), f"{cents / 100:.2f}", f"{count * cents / 100:.2f}") for name, count, cents in rows]
    cells.append(("total", str(sum(count for _, count, _ in rows)), "", f"{sum(count * cents for _, count, cents in rows) / 100:.2f}"))
    head = ("item", "count", "price", "sum")
    if deal.below(2):
        return "\n".join(",".join(row) for row in (head, *cells))
    return "\n".join(["| " + " | ".join(head) + " |", "|---|---:|---:|---:|", *("| " + " | ".join(row) + " |" for row in cells)])


def log(deal: Dealer) -> str:
    """Lines of a log, in order of time."""
    second, lines = deal.number(0, 80000), []
    for _ in range(deal.number(3, 5)):
        second += deal.number(1, 400)
        stamp = f"2026-{deal.number(1, 12):02}-{deal.number(1, 28):02}T{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}Z" if not lines else ""
        clock = stamp or f"{lines[0][:11]}{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}Z"
        said = deal.one(
            [
                f"INFO  {deal.one(NOUNS)} {deal.number(1, 9999)} accepted in {deal.number(1, 900)} ms",
                f"WARN  retry {deal.number(1, 5)} of 5 for {deal.one(NOUNS)}.{deal.one(FIELDS)}",
                f"ERROR {deal.one(NOUNS)}: expected {deal.number(1, 64)} values, found {deal.number(65, 128)}",
                f"DEBUG cache {deal.number(1, 100)} % full, {deal.number(10, 9999)} entries",
            ]
        )
        lines.append(f"{clock} {said}")
    return "\n".join(lines)


def settings(deal: Dealer) -> str:
    """TOML, YAML or INI."""
    noun, first, second = deal.one(NOUNS), *deal.some(FIELDS, 2)
    return deal.one(
        [
            f'[{noun}]\n{first} = {deal.number(1, 999)}\n{second} = "{deal.one(NAMES).lower()}"\nretries = [{deal.number(1, 9)}, {deal.number(10, 99)}]\n\n[{noun}.limits]\nseconds = {deal.number(1, 60)}.5',
            f"{noun}:\n  {first}: {deal.number(1, 999)}\n  {second}: {deal.one(['on', 'off', 'auto'])}\n  hosts:\n    - 10.0.{deal.number(0, 255)}.{deal.number(1, 254)}\n    - 10.0.{deal.number(0, 255)}.{deal.number(1, 254)}",
            f"; {noun} settings, see chapter {deal.number(2, 14)}\n{first}={deal.number(1, 999)}\n{second}=%({first})s-{deal.number(1, 99)}",
        ]
    )


def sums(deal: Dealer) -> str:
    """Arithmetic that is right."""
    lines = []
    for _ in range(deal.number(3, 5)):
        a, b, c = deal.number(2, 999), deal.number(2, 99), deal.number(2, 12)
        lines.append(
            deal.one(
                [
                    f"{a} + {b} = {a + b}",
                    f"{a} x {b} = {a * b}",
                    f"{a * b} / {b} = {a}",
                    f"({a} - {b}) * {c} = {(a - b) * c}",
                    f"2^{c} = {2**c}",
                    f"{a} mod {c} = {a % c}",
                ]
            )
        )
    return "\n".join(lines)
