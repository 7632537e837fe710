"""What goes wrong when bytes of others are decoded."""

import msgspec

MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""All that msgspec's decoders raise for bytes that are not what they should be: its own errors, and two that are none of
them, for text that is no UTF-8 and for nesting without end. For ``except``."""
