"""L6: other libraries. Names, layouts and call orders are translated here, nothing is computed."""
