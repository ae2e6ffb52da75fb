"""What a setting costs and what it gives: load, latency and memory in fresh processes, the record, the report.

``run`` starts one ``worker`` process per setting and round; ``record`` is the JSON truth; ``table``, ``page``
and ``plots`` are drawn from it and from nothing else. This room knows no export format and no quality metric:
engines and probes are named by import path. Importing it imports nothing heavy.
"""
