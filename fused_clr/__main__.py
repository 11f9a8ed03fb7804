"""``python -m fused_clr``: the command line."""

from fused_clr.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
