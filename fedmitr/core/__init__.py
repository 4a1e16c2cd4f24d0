"""What every other folder builds on: errors, paths, the store, processes, random streams, optimisers."""
