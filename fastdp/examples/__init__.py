"""Scripts as a user would write them: run with `python -m fastdp.examples.NAME`, read from top to bottom."""
