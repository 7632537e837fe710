"""The ``gvisor`` level: the guest's kernel is runsc's, inside the walls of a namespace cell."""
