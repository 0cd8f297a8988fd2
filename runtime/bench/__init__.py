"""`qexport bench`: latency of engines side by side, kernels one by one, servers under load."""
