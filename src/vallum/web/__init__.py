"""Read-only pages over the record."""
