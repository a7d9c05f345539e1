"""Programs to text (printer) and back (parser), in the one form that files, dumps and tests use."""
