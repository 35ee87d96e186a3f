"""One cell from its settings to its results: build, train, detect, evaluate, measure."""
