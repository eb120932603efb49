"""One file a command of `fastbert`; each has `add(commands)`."""
