import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent


def _load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


for _name in ("fake_engine", "fake_device", "bench_records", "page_records"):  # beside the tests; importlib mode puts no folder on the path
    if _name not in sys.modules:
        _load(_name)
