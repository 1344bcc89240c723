"""The commands that look at models and runs; `cli.py` hands their words to them."""
