"""What every operator stands on: its arguments' checks, its launches, its tiles."""
