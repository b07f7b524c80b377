"""What runs a graph.

backend (the protocol), onnx_cpu, onnx_cuda, torchscript, static_shapes, batcher, scheduler, latency_model.
"""
