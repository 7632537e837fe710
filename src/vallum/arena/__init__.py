"""Worlds to try walls in: a closed one made of namespaces and fakes, an agent that misbehaves in it, and peers to measure against.

Nothing here is part of containment. It drives the public face from outside, like any user.
"""
