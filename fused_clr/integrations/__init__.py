"""Training loops of other frameworks, captured: one module a framework, which imports it."""
