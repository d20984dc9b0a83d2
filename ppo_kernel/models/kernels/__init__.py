"""Fast forms of what the models compute, each with the plain form that it equals."""
