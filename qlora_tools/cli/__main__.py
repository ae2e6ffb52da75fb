"""``python -m qlora_tools.cli``, the same as ``qlt``."""

from qlora_tools.cli.main import main

if __name__ == "__main__":
    main()
