"""One file per op, each with a `case_<op>(settings)` that returns rows; bench.run finds them."""
