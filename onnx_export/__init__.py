"""The room of the ONNX exporter. Nothing is here yet: SA-Softmax models cannot be exported to ONNX so far."""

__all__: list[str] = []
