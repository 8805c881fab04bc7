"""Error measures, named problem shapes and timing. Only tests/ and bench/ import this."""
