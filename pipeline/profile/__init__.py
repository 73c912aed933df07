"""`pipeline run --profile`: listening to a run, and the table of where its time went."""
