"""Fast forms of the equations of the models, one file per form.

Each stands beside its plain form `plain_...`: the same arguments, the same values and gradients.
"""
