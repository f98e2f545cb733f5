"""Fakes, faulty storage and the oracle: what tests of this package, and of adapters for it, stand on."""
