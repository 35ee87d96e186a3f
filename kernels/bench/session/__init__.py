"""Everything that a first GPU owes this project, in one command; `python -m kernels.bench.session` runs it."""
