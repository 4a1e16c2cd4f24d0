"""What every other folder stands on: errors, paths, the store, processes, random streams, optimisers."""
