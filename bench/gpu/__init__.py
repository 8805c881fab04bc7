"""The stages of bench.on_gpu, and the model that its larger ones train and decode with."""
