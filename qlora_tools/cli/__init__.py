"""The command line. Nothing here imports torch at module level: ``qlt --help`` must start in under 0.3 s."""
