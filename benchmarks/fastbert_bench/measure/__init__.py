"""How a number is taken and written, the same in every suite."""
