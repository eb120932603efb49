"""`fastbert bench NAME` is NAME.py: contenders side by side, interleaved."""
