"""One cell from its settings to its row: build, train, evaluate, measure, in a pool of workers."""
