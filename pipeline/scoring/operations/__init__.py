"""The operations of a chain, one module each: what a step does with some rows of a batch."""
