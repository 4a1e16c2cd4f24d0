"""Steps 2 to 5: from uploads to one global model. Nothing here imports data or clients."""
