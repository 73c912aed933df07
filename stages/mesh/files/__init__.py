"""Reading mesh files: one reader per format, and the parts of a file joined into one mesh."""
