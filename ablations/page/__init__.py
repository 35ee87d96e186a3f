"""The report: one HTML file of tables, plots and exhibits that needs nothing else."""
