"""Acts on cells: cut, freeze, kill, hold. Every action is an event."""
