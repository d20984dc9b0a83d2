"""Stage 5b: experience -> train state."""
