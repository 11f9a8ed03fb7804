"""What other libraries do with the optimizer: frameworks, compilers, processes, and the examples."""
