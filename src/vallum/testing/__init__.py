"""Fakes of our own extension points and conformance suites, shipped so that users can test against them too."""
