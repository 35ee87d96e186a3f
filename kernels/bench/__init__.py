"""What the kernels cost: records of the operators, the compiler's report, roofs, tables, tuning."""
