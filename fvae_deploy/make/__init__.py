"""Export weights to bundles, build TensorRT engines, and measure both."""
