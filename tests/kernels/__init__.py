"""What a launch does, seen in the interpreter: its programs, memory and promises, norms, skips."""
