"""Tools of the reference agent: one contract (``base``), one file each."""
