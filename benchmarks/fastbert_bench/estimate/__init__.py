"""A step on paper: its launches, what each must take, and what a whole run follows to."""
