"""Compiled kernels, executed: what the compiler emits computes what torch does, within its memory, and without races.

`machine` executes PTX thread by thread: `text` parses it, `decode` decodes it (with `operands`; `compute` has the
instructions that compute, on `arithmetic`; `access` those that reach memory or other lanes), `memory` checks every
access and `races` their order; `faults` names what may be wrong. `device` makes the project's host code launch on it.

`test_instructions` and `test_faults` test the executor itself, in any process, on the programs of `assembled`. The
tests marked ``ptx`` compile kernels, so they need a process without the interpreter:
``FUSED_CLR_TEST_PTX=90 pytest tests/ptx -m ptx`` (the capability), with FUSED_CLR_TEST_PTX_SEED for other orders of
warps. With these, tests of `tests/parity` also run on compiled kernels. `make test` runs a part, `make ptx` more.
CONTRIBUTING.md says what this proves and what it cannot show.
"""
