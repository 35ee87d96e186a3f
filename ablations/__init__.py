"""The experiment: every combination and depth of DyHead, trained, evaluated, measured and put into tables."""
