"""The composition root: the one trusted process of a machine."""
