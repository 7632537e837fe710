"""The only way out of a cell. Protocol decisions are sans-I/O; a process without privilege serves the doors and fails closed."""
