"""One file per adapter format that others use: how to recognise it, read it into a portable record and, for some, write it."""
