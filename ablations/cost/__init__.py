"""What a grid will cost before it is run: the operations and the memory of its cells, and their time on GPUs."""
