"""Programs by template: Python, and shorter pieces in other languages, with names, numbers and shapes that vary. They are meant to be right."""

from __future__ import annotations

from dealing import Dealer

NOUNS = [
    "order",
    "user",
    "file",
    "token",
    "layer",
    "matrix",
    "ticket",
    "sensor",
    "packet",
    "account",
    "route",
    "node",
    "event",
    "frame",
    "price",
    "batch",
    "page",
    "score",
    "city",
    "widget",
]
FIELDS = ["name", "size", "price", "weight", "count", "status", "owner", "created", "colour", "length", "depth", "rate"]


def python(deal: Dealer) -> str:
    """One function or class."""
    return deal.one([_filter, _class, _search, _count, _parse, _test, _recursion, _numpy])(deal)


def _filter(deal: Dealer) -> str:
    noun, field, limit = deal.one(NOUNS), deal.one(FIELDS), deal.number(2, 500)
    return (
        f"def {deal.one(['select', 'keep', 'find'])}_{noun}s({noun}s: list[dict], limit: float = {limit}) -> list[dict]:\n"
        f'    """The {noun}s whose {field} is {deal.one(["at least", "more than"])} ``limit``, largest first."""\n'
        f'    kept = [{noun} for {noun} in {noun}s if {noun}["{field}"] >= limit]\n'
        f'    return sorted(kept, key=lambda {noun}: -{noun}["{field}"])'
    )


def _class(deal: Dealer) -> str:
    noun = deal.one(NOUNS)
    first, second = deal.some(FIELDS, 2)
    return (
        f"@dataclass\nclass {noun.title()}:\n    {first}: str\n    {second}: float = {deal.number(0, 9)}.{deal.number(0, 9)}\n\n"
        f'    def scaled(self, factor: float) -> {noun.title()}:\n        if factor <= 0:\n            raise ValueError(f"{second} must stay positive, got factor {{factor}}")\n'
        f"        return {noun.title()}(self.{first}, self.{second} * factor)"
    )


def _search(deal: Dealer) -> str:
    noun = deal.one(NOUNS)
    return (
        f"def position_of({noun}, {noun}s):\n    low, high = 0, len({noun}s)\n    while low < high:\n        middle = (low + high) // 2\n"
        f"        if {noun}s[middle] < {noun}:\n            low = middle + 1\n        else:\n            high = middle\n    return low if low < len({noun}s) and {noun}s[low] == {noun} else -1"
    )


def _count(deal: Dealer) -> str:
    noun, field = deal.one(NOUNS), deal.one(FIELDS)
    return (
        f"from collections import Counter\n\n\ndef {field}s_of({noun}s, most={deal.number(3, 20)}):\n    counts = Counter({noun}.{field} for {noun} in {noun}s if {noun}.{field} is not None)\n"
        f'    for {field}, number in counts.most_common(most):\n        print(f"{{{field}:>12}}  {{number}}")'
    )


def _parse(deal: Dealer) -> str:
    noun, mark = deal.one(NOUNS), deal.one([";", ",", "|", ":"])
    return (
        f'def read_{noun}s(path):\n    with open(path, encoding="utf-8") as lines:\n        for number, line in enumerate(lines, 1):\n            line = line.strip()\n'
        f'            if not line or line.startswith("#"):\n                continue\n            name, mark, value = line.partition("{mark}")\n'
        f'            if not mark:\n                raise ValueError(f"{{path}}, line {{number}}: expected name{mark}value")\n            yield name.strip(), float(value)'
    )


def _test(deal: Dealer) -> str:
    noun, first, second = deal.one(NOUNS), deal.number(2, 40), deal.number(2, 40)
    return (
        f'@pytest.mark.parametrize(("first", "second", "total"), [({first}, {second}, {first + second}), (0, {second}, {second}), (-{first}, {first}, 0)])\n'
        f"def test_{noun}s_add_up(first, second, total):\n    assert add(first, second) == total\n    assert add(second, first) == total"
    )


def _recursion(deal: Dealer) -> str:
    noun = deal.one(NOUNS)
    return (
        f'def depth({noun}):\n    """Levels below ``{noun}``; 0 for a leaf."""\n    children = {noun}.get("children", ())\n'
        f'    return 1 + max(map(depth, children)) if children else 0\n\n\ndef flatten({noun}, level=0):\n    yield level, {noun}["name"]\n'
        f'    for child in {noun}.get("children", ()):\n        yield from flatten(child, level + 1)'
    )


def _numpy(deal: Dealer) -> str:
    rows, columns = deal.number(2, 64), deal.number(2, 64)
    return (
        f"rng = np.random.default_rng({deal.number(0, 99)})\nx = rng.standard_normal(({rows}, {columns}))\nscale = np.abs(x).max(axis=1, keepdims=True) / {deal.one([7, 127])}\n"
        f'codes = np.round(x / scale).astype(np.int8)\nerror = np.linalg.norm(codes * scale - x) / np.linalg.norm(x)\nprint(f"relative error {{error:.4f}}")'
    )


def other_languages(deal: Dealer) -> str:
    noun, field, number = deal.one(NOUNS), deal.one(FIELDS), deal.number(2, 90)
    return deal.one(
        [
            f"SELECT {noun}.{field}, COUNT(*) AS n\nFROM {noun}s AS {noun}\nJOIN owners ON owners.id = {noun}.owner_id\nWHERE {noun}.created >= '20{deal.number(10, 25)}-0{deal.number(1, 9)}-01'\nGROUP BY {noun}.{field}\nHAVING COUNT(*) > {number}\nORDER BY n DESC;",
            f"export function total(items) {{\n  return items\n    .filter((item) => item.{field} > {number})\n    .reduce((sum, item) => sum + item.{field}, 0);\n}}",
            f"int count_{noun}s(const int *values, size_t n) {{\n    int found = 0;\n    for (size_t i = 0; i < n; ++i) {{\n        if (values[i] > {number}) found++;\n    }}\n    return found;\n}}",
            f"fn largest(values: &[u32]) -> Option<u32> {{\n    values.iter().copied().filter(|v| v % {number} != 0).max()\n}}",
            f'<section class="{noun}">\n  <h2>{noun.title()}s</h2>\n  <ul>\n    <li data-{field}="{number}">first {noun}</li>\n    <li data-{field}="{number * 2}">second {noun}</li>\n  </ul>\n</section>',
            f".{noun} {{\n  display: grid;\n  grid-template-columns: repeat({deal.number(2, 6)}, 1fr);\n  gap: {number}px;\n  color: #{deal.number(256, 4095):03x};\n}}",
            f'public record {noun.title()}(String {field}, int count) {{\n    public {noun.title()} {{\n        if (count < 0) throw new IllegalArgumentException("count: " + count);\n    }}\n}}',
            f"func Sum{noun.title()}s(values []int) (total int) {{\n\tfor _, value := range values {{\n\t\tif value != {number} {{\n\t\t\ttotal += value\n\t\t}}\n\t}}\n\treturn\n}}",
        ]
    )


def commands(deal: Dealer) -> str:
    """A shell session or a short script."""
    noun, number = deal.one(NOUNS), deal.number(2, 900)
    lines = deal.some(
        [
            f"$ ls -l {noun}s/ | wc -l\n{number}",
            f"$ grep -c '{noun}' notes.txt\n{number}",
            f"$ du -sh {noun}s\n{number}M\t{noun}s",
            f"$ git log --oneline | head -1\n{deal.number(1 << 24, (1 << 28) - 1):07x} Read {noun}s in order",
            f"$ python -m pytest tests/test_{noun}.py -q\n{number} passed in {deal.number(1, 90)}.{deal.number(10, 99)}s",
            f'$ for f in {noun}-*.csv; do head -n 1 "$f"; done',
            f"$ sort -k2 -n {noun}s.tsv | tail -n {deal.number(2, 9)}",
            f"$ curl -sf https://example.org/{noun}s/{number} || echo 'no such {noun}' >&2",
        ],
        deal.number(2, 3),
    )
    return "\n".join(lines)
