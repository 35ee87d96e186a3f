"""What the generated data set shows."""
