"""How everything outside the node speaks to it: the wire, and the Python face. Imports nothing of what judges."""
