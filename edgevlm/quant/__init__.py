"""From a float graph to a quantized one: recipes say what, methods say how, the result is standard ONNX either way."""
