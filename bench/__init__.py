"""Benches: every row is a ratio to a peer that was measured in the same run; see NOTES.md."""
