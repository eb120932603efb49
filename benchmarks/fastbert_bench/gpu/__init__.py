"""`python -m fastbert_bench.gpu`: everything that needs a GPU, in a given time."""
