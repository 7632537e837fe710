"""Root file systems: one contract, one file per kind of reference."""
