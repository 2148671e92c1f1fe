"""Generators, tolerances and the bench harness. For tests and benches; nothing in the library imports it."""
