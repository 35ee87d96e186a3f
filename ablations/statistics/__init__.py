"""What a difference of measured numbers is worth: variance between trainings, variance over images, intervals."""
