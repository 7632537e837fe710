"""The namespace level: cells that share the kernel, built by the C program in native/."""
