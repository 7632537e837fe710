"""The battery: published classes of escapes as real programs, run against real cells; see base.py and battery.py."""
