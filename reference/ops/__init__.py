"""Array maths, one token at a time."""
