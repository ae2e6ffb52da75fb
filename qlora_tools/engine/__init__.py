"""One loop for every stage: a plan of small pure units, run with one unit resident per worker."""
