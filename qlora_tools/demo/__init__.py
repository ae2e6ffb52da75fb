"""A pair of small models trained on the text that every Python installation carries; see :mod:`qlora_tools.demo.pair`."""
