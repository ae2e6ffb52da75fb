"""One file per verb: a keyword-only function and the frozen record it returns. Re-exported by ``qlora_tools.api``.

This floor is where rooms are put together; it holds no numerics of its own.
"""
