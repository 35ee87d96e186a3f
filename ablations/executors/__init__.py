"""Who runs the cells of a grid: processes of this machine, ranks of several GPUs, machines of a cluster."""
