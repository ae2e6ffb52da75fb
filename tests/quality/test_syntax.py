"""What counts as Python, when a continuation ends, and how shares are compared."""

from __future__ import annotations

import ast
import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_tools.errors import CorruptError, IncompatibleError, UsageError
from qlora_tools.quality.prompts import Prompt, function_prompts, library_prompts, read_prompts
from qlora_tools.quality.syntax import (
    Generation,
    SyntaxShare,
    check_prompts,
    compare_syntax,
    end_of_function,
    generate,
    judge,
    syntax_share,
    wilson,
)

HEAD = 'def f(x):\n    """Doc."""'


class Letters:
    """A tokenizer of single characters; id 0 ends a text."""

    stop = frozenset({0})

    def ids(self, prompt):
        return [ord(letter) for letter in prompt]

    def text(self, ids):
        return "".join(map(chr, ids))


class Parrot:
    """A model that writes ``text`` after any prompt, then ends."""

    def __init__(self, text):
        self.text, self.calls = text, 0

    def prefill(self, ids_BT):
        assert ids_BT.dtype == np.int64 and ids_BT.ndim == 2
        self.position = 0
        return self._next()

    def decode(self, tokens_B):
        assert tokens_B.tolist() == [ord(self.text[self.position - 1])]
        return self._next()

    def _next(self):
        self.calls += 1
        logits_BV = np.zeros((1, 256), np.float32)
        logits_BV[0, ord(self.text[self.position]) if self.position < len(self.text) else 0] = 1
        self.position += 1
        return logits_BV


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("\n    return x\n", "parses"),
        ("\n    retur", "parses"),  # the model said it had finished: a name is a statement
        ("\n    pass\n", "parses"),
        ("\n    x is 1\n", "parses"),  # a SyntaxWarning is no error
        (" + 'more'\n", "parses"),
        ("", "empty"),
        ("\n\n\n", "empty"),
        ("\n    # todo\n", "empty"),
        ("\n    if x:\n", "broken"),
        ("\n    return foo(x\n", "broken"),
        ("\n    y = 1\n    return foo(x\n", "broken"),
        ("\n    y = 1 2\n", "broken"),
        ("\n    y = 1\n  return y\n", "broken"),
        ("\n    y = '\x00'\n", "broken"),
        ("\n    y = '\ud800'\n", "broken"),
        ("\n    y = 1\n    return " + "(" * 3000 + "x\n", "broken"),
        ("\n    y = 1\n    return " + "-" * 100_000 + "x\n", "broken"),
    ],
)
def test_a_finished_continuation_must_parse_as_a_whole_and_say_something(text, outcome):
    assert judge(HEAD, text, "stop")[1] == outcome


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("\n    return x\n    y = (1,", "open"),
        ("\n    if x:\n        retu", "open"),
        ("\n    try:\n        y = 1\n    exc", "open"),
        ("\n    y = 1\n    z = foo(1,\n        2,\n", "open"),
        ("\n    y = 1\n    @property\n", "open"),
        ("\n    match x:\n        cas", "open"),
        ("\n    y = '''one\n  two\n", "empty"),  # a string left open to the limit
        ("\n    y = [1, 2,\n 3, 4,\n", "empty"),
        ("\n    retur", "empty"),
        ("", "empty"),
        ("\n    y = 1 2\n    retur", "broken"),
        ("\n    y = 'abc\n    z = 1\n", "broken"),
        ("\n    y = foo(1\n    return y\n    z", "broken"),
        ("\n    if x:\n    return y\n    z", "broken"),
        ("\n    if x\n        return y\n", "broken"),
    ],
)
def test_the_token_limit_neither_makes_an_error_nor_forgives_one(text, outcome):
    assert judge(HEAD, text, "limit")[1] == outcome


@given(st.integers(0, 400))
def test_no_cut_of_right_python_is_called_broken(cut):
    body = (
        '\n    try:\n        for k, v in d.items():\n            if not (k and\n                    v):\n                s = """a\nb"""\n    except E as e:\n'
    )
    body += "        raise X from e\n    else:\n        with a as b, c:\n            x = [i for i in\n  b]\n    @d\n    class A:\n        pass\n    match x:\n        case [1, *_]:\n            return f'{x!r:>{w}}' \\\n  + 1\n"
    ast.parse(HEAD + body)
    assert judge(HEAD, body[:cut], "limit")[1] in ("open", "empty")
    assert judge(HEAD, body, "stop")[1] == "parses"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("\n    return x\nprint", "\n    return x\n"),
        ("\n    y = [\n1,\n]\n    return y\n\n\n@", "\n    y = [\n1,\n]\n    return y\n\n\n"),
        ('\n    y = """\nabc\n"""\nz', '\n    y = """\nabc\n"""\n'),
        ("\n    y = 1\n# remark\n    z = 2\nq", "\n    y = 1\n# remark\n    z = 2\n"),
        ("\n\ndef g", "\n\n"),
        ("\n    return x\n\n ", None),
        ("\n    return x\n# remark\n", None),
        ("\n    y = (1,\n2", None),
    ],
)
def test_a_function_ends_before_the_first_line_at_column_0(text, kept):
    end = end_of_function(HEAD, text)
    assert (None if end is None else text[:end]) == kept


def test_a_prompt_of_several_functions_ends_where_its_last_one_does():
    prompt = "import os\n\ndef a():\n    pass\n\n" + HEAD
    assert end_of_function(prompt, "\n    return a()\n") is None
    assert end_of_function(prompt, "\n    return a()\nx") == len("\n    return a()\n")


def test_generation_stops_at_the_dedent_and_keeps_what_was_written():
    parrot = Parrot("\n    return x\n\n\ndef g(): pass\n")
    found = generate(parrot, Letters(), Prompt("p", HEAD), 100)
    assert (found.ended, found.outcome, found.judged) == ("dedent", "parses", "\n    return x\n\n\n")
    assert parrot.calls == found.tokens == len("\n    return x\n\n\nd")


def test_generation_stops_at_the_end_of_text_and_at_the_limit():
    assert generate(Parrot("\n    return x"), Letters(), Prompt("p", HEAD), 100).ended == "stop"
    limited = generate(Parrot("\n    return x\n    y = 1"), Letters(), Prompt("p", HEAD), 18)
    assert (limited.ended, limited.outcome, limited.tokens, limited.judged) == ("limit", "open", 18, "\n    return x\n")


def test_nothing_written_is_ever_run(tmp_path):
    mark = tmp_path / "ran"
    share = syntax_share(Parrot(f"\n    return x\n    open({str(mark)!r}, 'w')\n"), Letters(), [Prompt("p", HEAD)])
    assert share.counts["parses"] == 1 and not mark.exists()


def test_a_prompt_that_cannot_become_python_is_refused_by_name():
    with pytest.raises(UsageError, match=r"mine:3: no continuation .* line 1"):
        check_prompts([Prompt("mine:3", "def f(:\n    x = ")])
    check_prompts([Prompt("a", "x = "), Prompt("b", 'def f():\n    """open'), Prompt("c", HEAD)])


def test_no_prompts_and_no_tokens_are_errors():
    with pytest.raises(UsageError, match="no prompts"):
        syntax_share(Parrot(""), Letters(), [])
    with pytest.raises(UsageError, match="gives no tokens"):
        generate(Parrot(""), Letters(), Prompt("p", ""), 3)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (81, 263), (1, 1)])
def test_wilson_bounds_solve_the_score_equation(successes, trials):
    found = wilson(successes, trials)
    share = successes / trials
    for bound in found.bounds:  # |share - p| = z sqrt(p (1 - p) / n) holds at both bounds
        assert abs(share - bound) == pytest.approx(1.959963984540054 * math.sqrt(bound * (1 - bound) / trials), abs=1e-9)
    assert 0 <= found.low <= share <= found.high <= 1


def shares(text_of_outcomes, names=None):
    generations = tuple(
        Generation(str(number), "", "", "stop", "parses" if letter == "1" else "broken", None, 1) for number, letter in enumerate(text_of_outcomes)
    )
    return SyntaxShare(generations, wilson(text_of_outcomes.count("1"), len(text_of_outcomes)), {})


def test_models_are_compared_prompt_by_prompt():
    a, b = shares("1" * 20), shares("1" * 10 + "0" * 10)
    found = compare_syntax("a", a, "b", b)
    assert (found.only_a, found.only_b, found.verdict) == (10, 0, "a")
    assert found.p_value == pytest.approx(2 * 0.5**10) and found.difference.value == 0.5
    assert compare_syntax("b", b, "a", a).verdict == "b"
    same = compare_syntax("a", a, "a2", a)
    assert (same.verdict, same.p_value, same.difference.bounds) == ("tie", 1.0, (0.0, 0.0))


def test_a_chance_difference_is_a_tie():
    found = compare_syntax("a", shares("1110" * 5), "b", shares("1101" * 5))
    assert found.verdict == "tie" and found.difference.low < 0 < found.difference.high


def test_different_prompts_cannot_be_compared():
    with pytest.raises(IncompatibleError, match="same prompts"):
        compare_syntax("a", shares("11"), "b", shares("111"))


def test_a_prompt_ends_with_its_docstring_at_column_0():
    source = 'class A:\n    @property\n    async def f(self,\n                x=1):\n        """A docstring that is long enough to be taken here.\n\n        More."""\n        return x\n'
    (prompt,) = function_prompts(source, "a.py")
    assert (prompt.name, prompt.text) == (
        "a.py:f",
        'async def f(self,\n            x=1):\n    """A docstring that is long enough to be taken here.\n\n    More."""',
    )


def test_functions_without_docstring_or_body_give_no_prompt():
    doc = '"""A docstring that is long enough to be taken here, by its length."""'
    assert function_prompts(f"def f():\n    {doc}\n", "a.py") == []
    assert function_prompts("def f():\n    return 1\n", "a.py") == []
    assert function_prompts("not python", "a.py") == []


def test_every_library_prompt_is_parsed_by_its_own_body():
    found = library_prompts()
    assert len(found.prompts) > 500 and "standard library" in found.name
    assert list(found.prompts) == sorted(found.prompts, key=lambda prompt: __import__("hashlib").sha256(prompt.text.encode()).digest())
    for prompt in found.prompts[:200]:
        assert judge(prompt.text, "\n    return 1\n", "stop")[1] == "parses", prompt
        assert judge(prompt.text, "\n", "stop")[1] == "empty", prompt
    assert len({prompt.text for prompt in found.prompts}) == len(found.prompts) and sys.version_info >= (3, 11)


def test_own_prompts_come_from_jsonl_in_order(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n\n" for text in ("def b():", "def a():")))
    assert read_prompts(path).prompts == (Prompt("mine.jsonl:1", "def b():"), Prompt("mine.jsonl:3", "def a():"))


@pytest.mark.parametrize("line", ["{", '{"text": "x"}', '["x"]', '{"prompt": 3}', '{"prompt": " "}', "[" * 100_000])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "def a():"}\n' + line + "\n")
    with pytest.raises(CorruptError, match=r"mine\.jsonl:2"):
        read_prompts(path)


def test_unusable_prompt_files_are_refused(tmp_path):
    for name, content, error in [
        ("a.txt", b"x", UsageError),
        ("a.jsonl", b"\n", UsageError),
        ("b.jsonl", b"\xff\xfe", CorruptError),
        ("a.py", b"x = 1\n", UsageError),
        ("b.py", b"def f(:\n", CorruptError),
        ("c.py", b"# coding: nonsense\n", CorruptError),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(error, match=name):
            read_prompts(tmp_path / name)
