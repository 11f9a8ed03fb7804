"""The codegen audit: reads the machine code that the kernels compile to. It needs no GPU: `python -m tests.audit`."""
