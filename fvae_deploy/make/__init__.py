"""Bundles and TensorRT engines, made from weights and measured."""
