"""The run-time type checker that conftest.py switches on for the package."""

from beartype import BeartypeConf, beartype

# As for static checkers, an int is good enough where a float is annotated.
typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
