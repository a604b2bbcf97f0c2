"""The value changes that a rule may name, and what each loses: none can be undone. All else only moves elements."""

TRANSFORMS = {"normalize": "the lengths of the rows"}  # as norm_head divides each row by its length
