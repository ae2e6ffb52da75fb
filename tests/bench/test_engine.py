import pytest

from qlora_tools.bench.engine import locate
from qlora_tools.errors import UsageError


def test_an_import_path_leads_to_its_callable():
    from math import sqrt

    assert locate("math:sqrt") is sqrt


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("math", "not an import path"),
        (":x", "not an import path"),
        ("no_such_module_here:x", "no module `no_such_module_here`"),
        ("math:none", "has no `none`"),
        ("math:pi", "is a float"),
    ],
)
def test_a_wrong_path_is_told_apart(path, message):
    with pytest.raises(UsageError, match=message):
        locate(path)


def test_a_module_whose_own_import_is_missing_says_which(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        locate("needs_more:load")
