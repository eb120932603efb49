"""Result files as one page with pictures, and as tables of the README."""
