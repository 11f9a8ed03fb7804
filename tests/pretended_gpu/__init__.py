"""A pretended GPU: torch's CUDA build and Triton's own launcher over a driver without a device. ``make pretended-gpu``.

`driver.cpp` stands in for CUDA's driver and runtime, with the rules of capture and a watch for races between streams.
`device.py` runs torch's operators on the CPU, and Triton's kernels in the interpreter of a second process
(`interpreter.py`), which shares the memory. `build.py` makes the environment, compiles the driver and runs the tests.
"""
