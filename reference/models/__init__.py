"""A small Transformer, forward and backward, one sequence at a time.

The backward pass of `f` is `f_backward(gradient of the output, inputs of f)` and returns the
gradients of those inputs. It computes again what it needs of the forward pass.
"""
