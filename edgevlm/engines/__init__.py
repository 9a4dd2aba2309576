"""TensorRT engines: built from a bundle's parts, kept beside them, and found again by what they were built for."""
