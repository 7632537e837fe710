"""The reference agent: one loop, a few tools, any model. A client of the node like any other: it judges nothing and holds no key.

Read ``loop.py`` first; models, tools, hooks and compactions are siblings behind small contracts. Foreign agents are in
``harness``.
"""
