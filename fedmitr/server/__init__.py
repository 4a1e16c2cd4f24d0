"""Steps 2 to 5 of the method: from uploads to one global model. Nothing here imports data or clients."""
