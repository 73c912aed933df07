"""The page of a run, or of a folder of runs, on viser (extra `viewer`)."""
