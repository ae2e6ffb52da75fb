"""One file per verb: words to options, one call into ``api``, the result in words."""
