"""What only a GPU can show. Marked gpu: skipped without one, and run by `bench/on_gpu.sh`."""
