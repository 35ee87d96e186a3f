"""What was measured: the rows, their statistics, and the tables and plots made from them."""
